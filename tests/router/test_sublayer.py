"""The attention sublayer of decode steps in one call is, to the bit, what its parts are one by one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import Threads, native, needs_kernels, same_bits
from drawing import VOCAB
from reference import random_model, save
from stepping import Stepper

from cluster.config import ServeSettings
from cluster.local import choose_products, load_local_experts, open_model
from experts.arithmetic import PlainArithmetic
from experts.ffn import ExpertWeights
from experts.kernels.native import NativeArithmetic
from experts.placement import ExpertKey
from router.checkpoint import load_trunk
from router.kernels.native import choose_attend
from router.kernels.sublayer import NativeSublayer, choose_attention
from router.local_experts import LocalExperts
from router.model.attention import Sublayer
from router.model.decoder import Decoder, StepOutput
from router.routed import Routing

CPU = torch.device("cpu")
FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 32, "intermediate_size_mlp": 64,
    "num_local_experts": 16, "attention_chunk_size": 16, "floor_scale": 8, "bos_token_id": 0, "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "pad_token_id": None,
}  # fmt: skip
CHANGES: list[Mapping[str, Any]] = [
    {}, {"use_qk_norm": False}, {"attn_temperature_tuning": False, "num_key_value_heads": 6},
    {"num_experts_per_tok": 3, "head_dim": 96},
]  # fmt: skip


def make(folder: Path, *, fused: bool) -> Decoder:
    model = open_model(folder, "bfloat16")
    settings = ServeSettings(model_dir=folder, transport="local")
    arithmetic = choose_products(model, settings)
    trunk = load_trunk(model.checkpoint, model.config, model.dtype, CPU)
    attend = choose_attend(model.dtype, CPU, arithmetic)
    experts = load_local_experts(model, settings)
    if fused:
        return Decoder(model.config, trunk, experts, arithmetic, attend, fuse=choose_attention)
    return Decoder(model.config, trunk, experts, arithmetic, attend)


def outputs(decoder: Decoder, threads: int) -> tuple[list[StepOutput], Stepper]:
    """Prompts of many lengths, then decodes of all and of some, over borders of chunks."""
    generator = torch.Generator().manual_seed(3)
    lengths = (3, 15, 16, 17, 30, 40)
    sequences = [torch.randint(0, VOCAB, (length + 20,), generator=generator).tolist() for length in lengths]
    stepper = Stepper(decoder, sequences, block_size=4)
    found = []
    with Threads(threads):
        for row, length in enumerate(lengths):
            while stepper.requests[row].num_computed < length:
                found.append(stepper.step({row: min(9, length - stepper.requests[row].num_computed)}))
        for number in range(18):
            rows = range(len(lengths)) if number % 3 else range(number % 2, len(lengths), 2)
            # Known tokens end where these do, so that all are sampled.
            for row in rows:
                request = stepper.requests[row]
                request.token_ids = sequences[row][: request.num_computed + 1]
            found.append(stepper.step(dict.fromkeys(rows, 1)))
    return found, stepper


@needs_kernels
@pytest.mark.parametrize(("change", "threads"), [*((change, 1) for change in CHANGES), ({}, 2)], ids=str)
def test_in_one_call(tmp_path: Path, change: Mapping[str, Any], threads: int) -> None:
    folder = save(random_model({**FIELDS, **change}, seed=7), tmp_path)
    fused, plain = make(folder, fused=True), make(folder, fused=False)
    assert isinstance(fused._attention, NativeSublayer) and isinstance(plain._attention, Sublayer)
    (found, ours), (expected, theirs) = outputs(fused, threads), outputs(plain, threads)
    assert sum(len(one.logits_SV) for one in expected) > 60
    for one, other in zip(found, expected, strict=True):
        assert one.samples == other.samples and same_bits(one.logits_SV, other.logits_SV)
    for layer in range(fused.config.num_layers):
        for row, request in enumerate(ours.requests):
            chunked = fused.config.chunked_layers[layer]
            begin = request.num_computed // 16 * 16 if chunked else 0
            slots = [request.global_blocks[at // 4] * 4 + at % 4 for at in range(request.num_computed - begin)]
            for mine, other in zip(ours.store.layer(layer), theirs.store.layer(layer), strict=True):
                assert same_bits(mine[slots], other[slots]), (layer, row)


@pytest.mark.parametrize("change", [{"head_dim": 16}, {"hidden_size": 48}, {"num_attention_heads": 34}], ids=str)
def test_models_that_do_not_fit_are_computed_part_by_part(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = save(random_model({**FIELDS, **change}, seed=7), tmp_path)
    assert isinstance(make(folder, fused=True)._attention, Sublayer)


# ---- routed experts in one call


@needs_kernels
def test_layers_that_lack_an_expert_are_computed_expert_by_expert() -> None:
    """Experts are looked up by their number, which must not be mistaken for their place."""
    generator = torch.Generator().manual_seed(5)
    weights: dict[ExpertKey, ExpertWeights] = {
        (0, expert): ExpertWeights(
            gate_up_FH=torch.randn(64, 32, generator=generator).bfloat16(),
            down_HF=torch.randn(32, 32, generator=generator).bfloat16(),
        )
        for expert in (1, 3)
    }
    arithmetic = native("without AMX")
    assert isinstance(arithmetic, NativeArithmetic)
    x_TH = torch.randn(4, 32, generator=generator).bfloat16()
    routing = Routing(expert_TK=torch.tensor([[1], [3], [3], [1]]), score_TK=torch.rand(4, 1).bfloat16())
    found = LocalExperts(weights, arithmetic)
    expected = LocalExperts(weights, PlainArithmetic())
    y_TH, plain_TH = (experts.dispatch(0, x_TH, routing).combine().y_TH for experts in (found, expected))
    torch.testing.assert_close(y_TH, plain_TH, rtol=0.05, atol=0.5)
    assert found.load_snapshot().rows == expected.load_snapshot().rows == {(0, 1): 2, (0, 3): 2}
