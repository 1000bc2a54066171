"""What only a CUDA device can show; without one, everything here is skipped and says so."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from static_stepping import StaticStepper, compute_to, remote, sequences, show_next, stacked
from stepping import CPU, Stepper, load_decoder
from torch.profiler import ProfilerActivity, profile

import cluster.local
from cluster.config import ServeSettings
from cluster.local import build_engine, choose_device, load_local_experts, open_model
from cluster.tiny import make_tiny
from experts.stack import ExpertStack, every_product, grouped_products
from router.engine.cuda_graphs import GraphRecorder
from router.engine.engine import Engine
from router.engine.request import Event, FinishEvent, SamplingParams, TokenEvent
from router.model.decoder import RoutedExperts
from router.routed import Routing, to_host

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch finds none on this machine"
)

CUDA = torch.device("cuda", 0)
STARTS, NUM_STEPS = [27, 60, 0, 125, 62], 9


@pytest.fixture(scope="module", params=["scout", "maverick", "guard"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "model"
    make_tiny(request.param, path, seed=5)
    return path


def logits_of_ordinary_steps(folder: Path, ids: list[list[int]]) -> list[torch.Tensor]:
    """On the CPU."""
    stepper = Stepper(load_decoder(folder), ids)
    compute_to(stepper, STARTS)
    found = []
    for _ in range(NUM_STEPS):
        show_next(stepper, ids)
        found.append(stepper.step(dict.fromkeys(range(len(ids)), 1)).logits_SV)
    return found


def test_weights_go_to_the_device_and_rows_come_back(folder: Path) -> None:
    decoder = load_decoder(folder, device=CUDA)
    assert decoder.weights.device == CUDA
    experts, _ = remote(folder, CUDA)
    here = load_decoder(folder)
    if not decoder.config.moe_layers:
        return
    x_TH = torch.randn(6, decoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    expert_TK = torch.tensor([[0], [3], [1], [3], [7], [0]])
    routing = Routing(expert_TK=expert_TK, score_TK=torch.full((6, 1), 0.5))
    layer = decoder.config.moe_layers[0]
    expected = here.experts.dispatch(layer, x_TH, routing).combine().y_TH
    over_there = Routing(expert_TK=expert_TK.to(CUDA), score_TK=routing.score_TK.to(CUDA))
    for either in (decoder.experts, experts):
        found = either.dispatch(layer, x_TH.to(CUDA), over_there).combine().y_TH
        assert found.device == CUDA
        torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_one_copy_brings_rows_and_routing() -> None:
    x_TH = torch.randn(5, 12, device=CUDA).bfloat16()
    routing = Routing(
        expert_TK=torch.arange(10, device=CUDA).view(5, 2), score_TK=torch.rand(5, 2, device=CUDA).bfloat16()
    )
    copied, there = to_host(x_TH, routing)
    assert torch.equal(copied, x_TH.cpu())
    assert torch.equal(there.expert_TK, routing.expert_TK.cpu())
    assert torch.equal(there.score_TK, routing.score_TK.cpu())
    assert copies_to_host(lambda: to_host(x_TH, routing)) == 1


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_graphs_equal_ordinary_steps_on_the_cpu(folder: Path, cut: bool) -> None:
    experts: RoutedExperts | None = remote(folder, CUDA)[0] if cut else None
    decoder = load_decoder(folder, experts=experts, device=CUDA)
    ids = sequences(decoder.config.vocab_size, *(start + NUM_STEPS for start in STARTS))
    expected = logits_of_ordinary_steps(folder, ids)
    at_hand = None if cut else stacked(folder, device=CUDA)
    with torch.inference_mode():
        static = StaticStepper(decoder, ids, at_hand, GraphRecorder(CUDA))
        compute_to(static, STARTS)
        for logits in expected:
            show_next(static, ids)
            found = static.decode()
            torch.testing.assert_close(found.logits_SV.cpu(), logits, atol=1e-3, rtol=1e-3)


def test_a_cut_step_copies_once_per_layer_to_the_host(tmp_path: Path) -> None:
    make_tiny("scout", tmp_path / "tiny")
    # Experts that stay on the CPU, so that every copy seen is the router's.
    decoder = load_decoder(tmp_path / "tiny", experts=remote(tmp_path / "tiny", CPU)[0], device=CUDA)
    ids = sequences(decoder.config.vocab_size, 9, 9, 9)
    with torch.inference_mode():
        static = StaticStepper(decoder, ids, None, GraphRecorder(CUDA))
        compute_to(static, [5, 5, 5])
        static.decode()
        assert copies_to_host(static.decode) == len(decoder.config.moe_layers)


def copies_to_host(work: Callable[[], object]) -> int:
    """How many copies from the device to the host `work` makes."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return sum(event.name.startswith("Memcpy DtoH") for event in profiler.events())


def test_the_grouped_kernel_is_every_product() -> None:
    if torch.cuda.get_device_capability(CUDA)[0] not in (9, 10):
        pytest.skip("this CUDA device has no grouped product that needs no copy to the host")
    generator = torch.Generator().manual_seed(3)
    gate_up = torch.randn(8, 64, 128, generator=generator) / math.sqrt(128)
    stack = ExpertStack(gate_up_EFH=gate_up.bfloat16().to(CUDA), down_EHF=torch.empty(8, 128, 32, device=CUDA))
    x_RK = torch.randn(13, 128, generator=generator).bfloat16().to(CUDA)
    ends_E = torch.tensor([0, 4, 4, 5, 5, 13, 13, 13], dtype=torch.int32, device=CUDA)
    found, expected = (one(x_RK, stack.gate_up_EFH, ends_E) for one in (grouped_products, every_product))
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


class CountingRecorder(GraphRecorder):
    """Counts what it records."""

    made = 0

    def __call__(self, works: Sequence[Callable[[], Any]]) -> list[Callable[[], Any]]:
        CountingRecorder.made += 1
        return super().__call__(works)


def answers(model_dir: Path, device: str, dtype: str) -> list[list[tuple[int, float]]]:
    """Greedy tokens and their log probabilities of five requests at a time, by the engine with local experts."""
    settings = ServeSettings(
        model_dir=model_dir, transport="local", device=device, dtype=dtype, kv_memory=1 << 24, max_batch_tokens=64
    )
    model = open_model(model_dir, dtype)
    experts = load_local_experts(model, settings)
    engine = build_engine(model, settings, experts, lambda _missing: True, at_hand=experts.stacked)
    engine.start()
    try:
        return list(_ask(engine, sequences(model.config.vocab_size, 5, 60, 30, 7, 3)))
    finally:
        engine.stop()


def _ask(engine: Engine, prompts: list[list[int]]) -> Iterator[list[tuple[int, float]]]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, num_logprobs=0)
    for row, prompt in enumerate(prompts):
        engine.submit(str(row), 0, prompt, [], sampling, time.monotonic() + 600, events.put)
    found: dict[str, list[tuple[int, float]]] = {str(row): [] for row in range(len(prompts))}
    left = len(prompts)
    while left:
        event = events.get(timeout=120)
        if isinstance(event, TokenEvent):
            assert event.logprobs is not None
            found[event.request_id].append((event.token_id, event.logprobs.logprob))
        left -= isinstance(event, FinishEvent)
    yield from found.values()


def test_the_engine_answers_as_on_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.local, "GraphRecorder", CountingRecorder)
    CountingRecorder.made = 0
    expected, found = answers(folder, "cpu", "float32"), answers(folder, "cuda", "float32")
    assert CountingRecorder.made > 0, "no step ran as a graph"
    assert [[token for token, _ in one] for one in found] == [[token for token, _ in one] for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert [logprob for _, logprob in ours] == pytest.approx([logprob for _, logprob in theirs], abs=1e-3)


def test_bfloat16_runs_as_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the grouped kernel where there is one. Bits differ, so only sanity is asked for."""
    monkeypatch.setattr(cluster.local, "GraphRecorder", CountingRecorder)
    CountingRecorder.made = 0
    found = answers(folder, "cuda", "bfloat16")
    assert CountingRecorder.made > 0
    assert all(len(one) == 12 and all(math.isfinite(logprob) for _, logprob in one) for one in found)


def test_settings_name_the_device(folder: Path) -> None:
    assert choose_device(ServeSettings(model_dir=folder, device="cuda")).type == "cuda"
