"""The decoder against live transformers on randomly drawn configurations, in float32."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import in_batches
from drawing import FIRST_SPECIAL, SMALLEST_VISION, VOCAB, Writing, text_fields, writings
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
from safetensors.torch import load_file, save_file
from stepping import Stepper, all_logits, load_decoder, packed_logits
from transformers import Llama4ForCausalLM

ATOL = 1e-4


@in_batches(5)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(fields=text_fields(), seed=st.integers(0, 1 << 20), data=st.data())
def test_random_configs(batch: int, fields: dict[str, Any], seed: int, data: st.DataObject) -> None:
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


PLAIN: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 24,
    "num_local_experts": 4, "attention_chunk_size": 16, "floor_scale": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize("multimodal", [False, True], ids=["text", "multimodal"])
@pytest.mark.parametrize("differs", [False, True], ids=["equal", "differs"])
def test_a_stored_head_wins_over_a_tied_one(tmp_path: Path, multimodal: bool, differs: bool) -> None:
    """transformers ties only what is absent or equal."""
    fields = {**PLAIN, "tie_word_embeddings": True}
    model = random_multimodal(fields, SMALLEST_VISION, 5) if multimodal else random_model(fields, 5)
    folder = save(model, tmp_path)
    weights = load_file(folder / "model.safetensors")
    prefix = "language_model." if multimodal else ""
    embedding = weights[prefix + "model.embed_tokens.weight"]
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(9))
    weights[prefix + "lm_head.weight"] = noise if differs else embedding.clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    trunk = load_decoder(folder).weights
    assert (trunk.head_VH is trunk.embedding_VH) is not differs, "equal ones share their memory"
    assert_equal_to_reference(folder, type(model))


INSIDE = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1000.0}
ORIGINAL = "original_max_position_embeddings"
ROPES: dict[str, dict[str, Any]] = {
    "beside-and-inside": {"rope_parameters": {**INSIDE, ORIGINAL: 16}, ORIGINAL: 64},
    "beside-alone": {"rope_parameters": INSIDE, ORIGINAL: 16},
    "beside-an-old-object": {"rope_parameters": None, "rope_scaling": INSIDE, ORIGINAL: 16},
    "inside-alone": {"rope_parameters": {**INSIDE, ORIGINAL: 16}},
    "nowhere": {"rope_parameters": INSIDE, "max_position_embeddings": 32},
}


@pytest.mark.parametrize("name", ROPES)
def test_the_original_length_wherever_it_stands(tmp_path: Path, name: str) -> None:
    folder = save(random_model(PLAIN, 5), tmp_path)
    rewrite_config(folder, ROPES[name])
    assert_equal_to_reference(folder, Llama4ForCausalLM)


def assert_equal_to_reference(folder: Path, kind: type[Model]) -> None:
    """What transformers reads from `folder` gives the logits that we give."""
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(3)
    ids, expected = clear_run(model, lambda: torch.randint(0, FIRST_SPECIAL, (24,), generator=generator).tolist())
    ours = all_logits(load_decoder(folder), ids, [1])
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("position", [6, 7, 8, 15, 16, 17, 31, 32, 33])
def test_cached_decoding_at_borders(position: int, tmp_path: Path) -> None:
    """Prefill up to a chunk border (16) or temperature step (8), one less and one more, then decode across it."""
    model = random_model(PLAIN, seed=5)
    ids = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(position)).tolist()
    expected, gap = reference_run(model, ids)
    assert gap > NEAR_TIE
    ours = all_logits(load_decoder(save(model, tmp_path)), ids, [position, 1])
    known = ~ours.isnan().any(-1)
    assert known[position:].all()
    torch.testing.assert_close(ours[known], expected[known], atol=ATOL, rtol=0)
