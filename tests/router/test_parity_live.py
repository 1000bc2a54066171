"""The decoder against live transformers on randomly drawn configurations, in float32."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import SMALLEST_VISION, VOCAB, Writing, text_fields, writings
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from reference import (
    NEAR_TIE,
    Model,
    clear_run,
    random_model,
    random_multimodal,
    reference_run,
    rewrite_config,
    rounding_error,
    save,
)
from stepping import Stepper, all_logits, load_decoder, packed_logits

ATOL = 1e-4


@settings(max_examples=240, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(fields=text_fields(), seed=st.integers(0, 1 << 20), data=st.data())
def test_random_configs(fields: dict[str, Any], seed: int, data: st.DataObject) -> None:
    """Every sort of configuration and of folder, in pieces of random lengths, several sequences packed together."""
    writing = data.draw(writings(fields), label="writing")
    lengths = data.draw(st.lists(st.integers(1, 26), min_size=1, max_size=3), label="lengths")
    counts = st.just([1]) | st.lists(st.integers(1, 17), min_size=1, max_size=8)
    pieces = data.draw(st.lists(counts, min_size=len(lengths), max_size=len(lengths)), label="pieces")
    block_size = data.draw(st.integers(1, 8), label="block_size")
    model = rounded(build(fields, writing, seed), writing.dtype)
    generator = torch.Generator().manual_seed(seed)
    runs = [
        clear_run(model, lambda length=length: torch.randint(0, VOCAB, (length,), generator=generator).tolist())
        for length in lengths
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = save(cast(model, writing.dtype), Path(name))
        rewrite_config(folder, writing.rewritten, old_spelling=writing.old_spelling)
        decoder = load_decoder(folder)
    ours = packed_logits(Stepper(decoder, [ids for ids, _ in runs], block_size), pieces)
    for row, (ids, expected) in zip(ours, runs, strict=True):
        known = ~row.isnan().any(-1)
        assert known[-1]
        allowed = ATOL
        if (row - expected)[known].abs().max() > ATOL:
            event("the reference itself enlarges rounding errors beyond the tolerance")
            allowed = max(ATOL, 4 * rounding_error(model.float(), ids))
        torch.testing.assert_close(row[known], expected[known], atol=allowed, rtol=0)


def build(fields: dict[str, Any], writing: Writing, seed: int) -> Model:
    if writing.multimodal:
        return random_multimodal(fields, SMALLEST_VISION, seed)
    return random_model(fields, seed)


def rounded(model: Model, dtype: torch.dtype) -> Model:
    """The float32 model whose weights `dtype` can hold."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def cast(model: Model, dtype: torch.dtype) -> Model:
    """Parameters alone: the tower's complex angles have no counterpart."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("position", [6, 7, 8, 15, 16, 17, 31, 32, 33])
def test_cached_decoding_at_borders(position: int, tmp_path: Path) -> None:
    """Prefill up to a chunk border (16) or temperature step (8), one less and one more, then decode across it."""
    fields = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 24,
        "num_local_experts": 4, "attention_chunk_size": 16, "floor_scale": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }  # fmt: skip
    model = random_model(fields, seed=5)
    ids = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(position)).tolist()
    expected, gap = reference_run(model, ids)
    assert gap > NEAR_TIE
    ours = all_logits(load_decoder(save(model, tmp_path)), ids, [position, 1])
    known = ~ours.isnan().any(-1)
    assert known[position:].all()
    torch.testing.assert_close(ours[known], expected[known], atol=ATOL, rtol=0)
