"""A very long prompt through the real engine, on a model small enough for it: does it fit, how long does it take, and
are the answers those of a reference that never holds more than a chunk?

The model has four layers, the last of which sees everything, and one query and one key/value head of 16. So the
reference can compute everything below the last layer chunk by chunk, and the last layer at a few positions only.
Shape letters: T tokens of a chunk, N all tokens, H hidden size, D head dimension, V vocabulary.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import queue
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from cluster.config import ServeSettings
from cluster.local import Model, build_engine, load_local_experts, open_model
from cluster.measure.drive import TIMEOUT_S
from cluster.topology import Role, needs
from experts.arithmetic import rms_norm
from experts.config import ModelConfig, parse_config
from experts.ffn import expert_ffn
from experts.placement import ExpertKey
from experts.tensor_names import expected_tensors
from router.checkpoint import load_trunk
from router.engine.engine import Engine, Runner
from router.engine.request import Event, FinishEvent, SamplingParams, TokenEvent
from router.engine.runner import ModelRunner
from router.gate import gate
from router.local_experts import LocalExperts
from router.model.attend import Turn, turn_heads
from router.model.kv_store import KVStore
from router.model.rope import inverse_frequencies, rotations, temperatures
from router.model.weights import LayerWeights, TrunkWeights

SEED = 20240
STEP_TOKENS = 8192
NUM_SAMPLES = 8
TEXT: dict[str, Any] = {
    "attention_chunk_size": 8192,
    "eos_token_id": 1,
    "floor_scale": 8192,
    "head_dim": 16,
    "hidden_size": 32,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "max_position_embeddings": 10_485_760,
    "model_type": "llama4_text",
    "no_rope_layer_interval": 4,
    "num_attention_heads": 1,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "torch_dtype": "float32",
    "use_qk_norm": True,
    "vocab_size": 512,
}


@dataclass(frozen=True, kw_only=True)
class ContextResult:
    """`kv_bytes` are resident, `kv_floor_bytes` what the layers must keep: every token in the one that sees all, one
    chunk in the others. `equal` of `samples` positions had the reference's token, `largest_error` is that of its log
    probability."""

    tokens: int
    prefill_s: float
    prefill_tokens_per_s: float
    decode_step_ms: float
    kv_bytes: int
    kv_floor_bytes: int
    peak_rss_bytes: int
    samples: int
    equal: int
    largest_error: float


def bench_context(num_tokens: int, samples: int = NUM_SAMPLES) -> ContextResult:
    """Run a prompt of `num_tokens` and compare at `samples` positions, the last one among them."""
    with tempfile.TemporaryDirectory() as folder:
        model = _make_model(Path(folder))
        settings = _settings(model, Path(folder), num_tokens)
        torch.set_num_threads(needs(settings, Role.ROUTER).threads)
        experts = load_local_experts(model, settings)
        trunk = load_trunk(model.checkpoint, model.config, model.dtype, torch.device("cpu"))
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(0, model.config.vocab_size, (num_tokens,), generator=generator).tolist()
        others = torch.randint(0, num_tokens, (samples - 1,), generator=generator).tolist()
        positions = sorted({*others, num_tokens - 1})
        with _engine(model, settings, experts) as (engine, store):
            started = time.perf_counter()
            [(first_at, *_), (last_at, *_)] = _ask(engine, "whole", ids, 2)
            kv_bytes = sum(_resident_bytes(tensor) for layer in range(4) for tensor in store.layer(layer))
            answers = {position: _ask(engine, f"{position}", ids[: position + 1], 1)[0] for position in positions}
        expected = Reference(model.config, trunk, experts.weights).log_probabilities(ids, positions)
    errors = [abs(answers[position][2] - float(expected[position][answers[position][1]])) for position in positions]
    return ContextResult(
        tokens=num_tokens,
        prefill_s=round(first_at - started, 1),
        prefill_tokens_per_s=round(num_tokens / (first_at - started), 1),
        decode_step_ms=round((last_at - first_at) * 1e3, 1),
        kv_bytes=kv_bytes,
        kv_floor_bytes=_floor_bytes(model, num_tokens),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        samples=len(positions),
        equal=sum(int(expected[position].argmax()) == answers[position][1] for position in positions),
        largest_error=round(max(errors), 7),
    )


def _settings(model: Model, folder: Path, num_tokens: int) -> ServeSettings:
    return ServeSettings(
        model_dir=folder,
        transport="local",
        kv_memory=int(_floor_bytes(model, num_tokens) * 1.02) + (1 << 20),
        max_model_len=num_tokens + 8,
        max_batch_tokens=STEP_TOKENS,
        max_running=1,
    )


def _floor_bytes(model: Model, num_tokens: int) -> int:
    config = model.config
    per_token = 2 * config.num_kv_heads * config.head_dim * model.dtype.itemsize
    chunk = min(num_tokens, config.chunk_size or num_tokens)
    return sum(per_token * (chunk if chunked else num_tokens) for chunked in config.chunked_layers)


@contextmanager
def _engine(model: Model, settings: ServeSettings, experts: LocalExperts) -> Iterator[tuple[Engine, KVStore]]:
    runners: list[Runner] = []

    def keep(runner: Runner) -> Runner:
        runners.append(runner)
        return runner

    engine = build_engine(model, settings, experts, lambda _missing: True, wrap=keep)
    [runner] = runners
    assert isinstance(runner, ModelRunner)
    engine.start()
    try:
        yield engine, runner.store
    finally:
        engine.stop()


def _ask(engine: Engine, name: str, ids: list[int], num_tokens: int) -> list[tuple[float, int, float]]:
    """When each token came, its id and its log probability."""
    arrived: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, num_logprobs=0)
    deadline = time.monotonic() + 100 * TIMEOUT_S
    engine.submit(name, 0, ids, [], sampling, deadline, lambda event: arrived.put((time.perf_counter(), event)))
    answers: list[tuple[float, int, float]] = []
    while True:
        at, event = arrived.get(timeout=100 * TIMEOUT_S)
        if isinstance(event, TokenEvent):
            assert event.logprobs is not None, "asked for"
            answers.append((at, event.token_id, event.logprobs.logprob))
        elif isinstance(event, FinishEvent):
            return answers


def _resident_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's pages that are in memory. Pages that were never touched are not."""
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    num_bytes = tensor.data_ptr() + tensor.nbytes - first
    pages = (ctypes.c_ubyte * -(-num_bytes // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(num_bytes), pages):
        raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def _make_model(folder: Path) -> Model:
    """Random weights whose products keep the size of their inputs, so that errors show."""
    shapes = expected_tensors(parse_config(TEXT))
    generator = torch.Generator().manual_seed(SEED)
    weights = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in sorted(shapes.items())
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TEXT))
    return open_model(folder)


class Reference:
    """The model by the book, a chunk at a time, and its last layer at the positions asked for only."""

    def __init__(self, config: ModelConfig, trunk: TrunkWeights, experts: Mapping[ExpertKey, Any]) -> None:
        self._config = config
        self._trunk = trunk
        self._experts = experts
        self._frequency = inverse_frequencies(config)

    @torch.inference_mode()
    def log_probabilities(self, ids: Sequence[int], positions: Sequence[int]) -> dict[int, torch.Tensor]:
        """By position, those of its next token, [V]."""
        chunk = self._config.chunk_size or len(ids)
        last = self._config.num_layers - 1
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        wanted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for start in range(0, len(ids), chunk):
            here = torch.arange(start, min(start + chunk, len(ids)))
            x_TH = F.embedding(torch.tensor(ids[start : start + chunk]), self._trunk.embedding_VH)
            for layer in range(last):
                query, key, value = self._heads(layer, x_TH, here)
                mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
                x_TH = self._rest(layer, x_TH, mixed)
            query, key, value = self._heads(last, x_TH, here)
            keys.append(key)
            values.append(value)
            wanted |= {p: (x_TH[p - start], query[:, p - start]) for p in positions if start <= p < start + chunk}
        key_1ND, value_1ND = torch.cat(keys, dim=1), torch.cat(values, dim=1)
        return {
            position: self._last(x_H, query_1D, key_1ND[:, : position + 1], value_1ND[:, : position + 1])
            for position, (x_H, query_1D) in wanted.items()
        }

    def _heads(self, layer: int, x_TH: torch.Tensor, position_T: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of the one head, each [1, T, D]."""
        config, weights = self._config, self._trunk.layers[layer]
        heads = F.linear(rms_norm(x_TH, config.norm_eps, weights.attention_norm_H), weights.qkv_PH)
        turn = Turn(temperature=temperatures(position_T, config))
        if config.rope_layers[layer]:
            turn = Turn(rotation=rotations(position_T, self._frequency), norm_eps=config.norm_eps)
        return tuple(part.transpose(0, 1) for part in turn_heads(heads.view(len(x_TH), 3, -1), 1, 1, turn))

    def _last(
        self, x_H: torch.Tensor, query_1D: torch.Tensor, key_1ND: torch.Tensor, value_1ND: torch.Tensor
    ) -> torch.Tensor:
        score_N = key_1ND[0].double() @ query_1D[0].double() / query_1D.shape[-1] ** 0.5
        mixed_D = torch.softmax(score_N, dim=0) @ value_1ND[0].double()
        x_TH = self._rest(self._config.num_layers - 1, x_H[None], mixed_D.to(x_H.dtype)[None, None])
        logits_TV = F.linear(rms_norm(x_TH, self._config.norm_eps, self._trunk.norm_H), self._trunk.head_VH)
        return torch.log_softmax(logits_TV[0].double(), dim=0)

    def _rest(self, layer: int, x_TH: torch.Tensor, mixed_1TD: torch.Tensor) -> torch.Tensor:
        """The layer after its attention: shared expert and, row by row of each, the chosen one."""
        config, weights = self._config, self._trunk.layers[layer]
        x_TH = x_TH + F.linear(mixed_1TD[0], weights.out_HQ)
        return x_TH + self._experts_of(layer, rms_norm(x_TH, config.norm_eps, weights.ffn_norm_H), weights)

    def _experts_of(self, layer: int, x_TH: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
        assert weights.gate_EH is not None
        routing = gate(F.linear(x_TH, weights.gate_EH), 1)
        y_TH = expert_ffn(weights.ffn, x_TH)
        for expert in range(self._config.num_experts):
            rows = (routing.expert_TK[:, 0] == expert).nonzero()[:, 0]
            y_TH[rows] += expert_ffn(self._experts[layer, expert], x_TH[rows] * routing.score_TK[rows])
        return y_TH
