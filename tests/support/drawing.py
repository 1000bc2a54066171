"""Hypothesis strategies of model configurations, and of how their folders are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

VOCAB = 64
FIRST_SPECIAL, PATCH = 60, 62
"""Ids from FIRST_SPECIAL on stand in no drawn text."""


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a folder of a configuration is written: its type of weights, its spelling, with a tower or without, and the
    fields of text_config that are rewritten behind transformers' back."""

    dtype: torch.dtype
    old_spelling: bool
    multimodal: bool
    rewritten: dict[str, Any]


@st.composite
def text_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a Llama4TextConfig: any widths, head counts, chunk, intervals, lists and experts, both rope types."""
    layers = draw(st.integers(1, 5))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "vocab_size": VOCAB,
        "hidden_size": draw(st.sampled_from([20, 32, 48])),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 5])),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 4, 6, 16])),
        "intermediate_size": draw(st.sampled_from([16, 24])),
        "intermediate_size_mlp": draw(st.sampled_from([16, 40])),
        "attention_chunk_size": draw(st.none() | st.integers(1, 12)),
        "use_qk_norm": draw(st.booleans()),
        "attn_temperature_tuning": draw(st.booleans()),
        "floor_scale": draw(st.sampled_from([3, 8, 8192])),
        "attn_scale": draw(st.sampled_from([0.1, 0.5])),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "rope_parameters": draw(_ropes()),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "pad_token_id": None,
        "max_position_embeddings": 4096,
        **draw(_guard_layers() | _layers(layers)),
    }


@st.composite
def _ropes(draw: st.DrawFn) -> dict[str, Any]:
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
    return rope


@st.composite
def _layers(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    """Which layers have experts, which rotate and which are chunked, by intervals or by lists."""
    experts = draw(st.integers(1, 6))
    kinds = st.sampled_from(["chunked_attention", "full_attention"])
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, min(experts, 3))),
        "interleave_moe_layer_step": draw(st.integers(1, 3)),
        "moe_layers": draw(st.none() | st.lists(st.integers(0, layers - 1), unique=True).map(sorted)),
        "no_rope_layer_interval": draw(st.integers(1, 5)),
        "no_rope_layers": draw(st.none() | st.just([]) | st.lists(st.integers(0, 1), min_size=layers, max_size=layers)),
        "layer_types": draw(st.none() | st.none() | st.lists(kinds, min_size=layers, max_size=layers)),
    }


def _guard_layers() -> st.SearchStrategy[dict[str, Any]]:
    """Llama Guard 4: dense, every layer rotates, no chunks."""
    guard = {
        "num_local_experts": 0,
        "interleave_moe_layer_step": 0,
        "moe_layers": [],
        "no_rope_layer_interval": 80,
        "attention_chunk_size": None,
    }
    return st.just(guard)


@st.composite
def writings(draw: st.DrawFn, text: dict[str, Any]) -> Writing:
    """What transformers cannot run (no chunk size) or writes out (what it computed) is put back as it was drawn."""
    drawn = ("attention_chunk_size", "moe_layers", "no_rope_layers", "layer_types")
    rewritten = {name: text[name] for name in drawn if name in text}
    if text["num_key_value_heads"] == text["num_attention_heads"]:
        rewritten["num_key_value_heads"] = None
    if text["head_dim"] * text["num_attention_heads"] == text["hidden_size"]:
        rewritten["head_dim"] = None
    return Writing(
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        old_spelling=not text.get("layer_types") and draw(st.booleans()),
        multimodal=draw(st.booleans()),
        rewritten=rewritten,
    )


SMALLEST_VISION: dict[str, Any] = {
    "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4, "image_size": 2,
    "patch_size": 2, "pixel_shuffle_ratio": 1.0, "projector_input_dim": 4, "projector_output_dim": 4,
    "vision_output_dim": 4,
}  # fmt: skip


@st.composite
def vision_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a Llama4VisionConfig: any widths, heads, grids, and shuffles of 1, 2 and 3.

    Nothing is narrower than 16: norms of a few numbers turn rounding into errors that prove nothing.
    """
    shuffle = draw(st.sampled_from([1, 2, 2, 2, 3]))
    heads, head_dim = draw(st.sampled_from([(1, 16), (2, 8), (2, 20), (3, 12), (4, 4)]))
    hidden = heads * head_dim
    adapter = draw(st.sampled_from([16, 25, 32]))
    patch = draw(st.sampled_from([1, 2, 5, 14]))
    return {
        "hidden_size": hidden,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": hidden * shuffle**2,
        "image_size": patch * shuffle * draw(st.integers(1, 3)),
        "patch_size": patch,
        "pixel_shuffle_ratio": 1 / shuffle,
        "projector_input_dim": adapter,
        "projector_output_dim": adapter,
        "vision_output_dim": adapter,
        "norm_eps": draw(st.sampled_from([1e-5, 1e-2])),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([100.0, 10000.0]))},
    }
