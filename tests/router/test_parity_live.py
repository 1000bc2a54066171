"""The decoder against live transformers on randomly drawn configurations, in float32."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from reference import gate_gaps, random_model, reference_logits, save
from stepping import Stepper, all_logits, load_decoder

ATOL = 1e-4
NEAR_TIE = 1e-4
VOCAB = 64


@st.composite
def text_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a Llama4TextConfig: any widths, head counts, chunk, intervals and experts, both rope types."""
    layers = draw(st.integers(1, 5))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    experts = draw(st.integers(1, 6))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": draw(st.sampled_from([10000.0, 500000.0]))}
    if draw(st.booleans()):
        low = draw(st.sampled_from([1.0, 2.0]))
        rope |= {
            "rope_type": "llama3",
            "factor": draw(st.sampled_from([8.0, 16.0])),
            "low_freq_factor": low,
            "high_freq_factor": low * draw(st.sampled_from([1.0, 4.0])),
            "original_max_position_embeddings": draw(st.sampled_from([16, 32, 8192])),
        }
    return {
        "vocab_size": VOCAB,
        "hidden_size": draw(st.sampled_from([24, 32, 48])),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 5])),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([4, 8, 16])),
        "intermediate_size": draw(st.sampled_from([16, 24])),
        "intermediate_size_mlp": draw(st.sampled_from([16, 40])),
        "num_local_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, min(experts, 3))),
        "interleave_moe_layer_step": draw(st.integers(1, 3)),
        "moe_layers": draw(st.none() | st.lists(st.integers(0, layers - 1), unique=True).map(sorted)),
        "no_rope_layer_interval": draw(st.integers(1, 5)),
        "no_rope_layers": draw(st.none() | st.lists(st.integers(0, 1), min_size=layers, max_size=layers)),
        "attention_chunk_size": draw(st.none() | st.integers(1, 20)),
        "use_qk_norm": draw(st.booleans()),
        "attn_temperature_tuning": draw(st.booleans()),
        "floor_scale": draw(st.sampled_from([3, 8, 8192])),
        "attn_scale": 0.1,
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "rope_parameters": rope,
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "pad_token_id": None,
        "max_position_embeddings": 4096,
    }


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(fields=text_configs(), seed=st.integers(0, 1 << 20), data=st.data())
def test_random_configs(fields: dict[str, Any], seed: int, data: st.DataObject) -> None:
    model = random_model(fields, seed)
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3), label="lengths")
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    if min(gate_gaps(model, ids) for ids in sequences) < NEAR_TIE:
        event("a gate is nearly tied: rounding may choose the expert")
        return
    expected = [reference_logits(model, ids) for ids in sequences]
    piece = data.draw(st.integers(1, 17), label="piece")
    block_size = data.draw(st.integers(1, 8), label="block_size")
    with tempfile.TemporaryDirectory() as folder:
        decoder = load_decoder(as_null_chunk(save(model, Path(folder)), fields))
        whole = all_logits(decoder, sequences[0], [1], block_size)
        torch.testing.assert_close(whole, expected[0], atol=ATOL, rtol=0)
        stepper = Stepper(decoder, sequences, block_size)
        while any(request.num_computed < request.num_known for request in stepper.requests):
            counts = {row: piece for row, r in enumerate(stepper.requests) if r.num_computed < r.num_known}
            output = stepper.step(counts)
            for logits, sample in zip(output.logits_SV, output.samples, strict=True):
                row = list(counts)[sample]
                last = stepper.requests[row].num_computed - 1
                torch.testing.assert_close(logits, expected[row][last], atol=ATOL, rtol=0)


def as_null_chunk(folder: Path, fields: dict[str, Any]) -> Path:
    """Write the null chunk size that transformers could not run back into the saved config."""
    if fields["attention_chunk_size"] is None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_chunk_size": None}))
    return folder


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
    assert gate_gaps(model, ids) > NEAR_TIE
    ours = all_logits(load_decoder(save(model, tmp_path)), ids, [position, 1])
    known = ~ours.isnan().any(-1)
    assert known[position:].all()
    torch.testing.assert_close(ours[known], reference_logits(model, ids)[known], atol=ATOL, rtol=0)
