"""config.json of every spelling, and what is refused in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from transformers import Llama4Config

from experts.config import parse_config
from experts.errors import InvalidInput
from experts.rope_config import RopeScaling
from experts.vision_config import VisionConfig

Raw = dict[str, Any]

RELEASED_VISION: Raw = {
    "model_type": "llama4_vision_model", "hidden_size": 1408, "num_hidden_layers": 34, "num_attention_heads": 16,
    "intermediate_size": 5632, "image_size": 336, "patch_size": 14, "num_channels": 3, "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096, "projector_output_dim": 4096, "vision_output_dim": 4096, "hidden_act": "gelu",
    "norm_eps": 1e-5, "rope_theta": 10000, "multi_modal_projector_bias": False, "vision_feature_layer": -1,
}  # fmt: skip


def multimodal(text: Raw | None = None, vision: Raw | None = None, **top: Any) -> Raw:
    """A released model's config with changes; None takes a field away."""
    raw: Raw = {
        "model_type": "llama4",
        "text_config": {"model_type": "llama4_text", **(text or {})},
        "vision_config": {**RELEASED_VISION, **(vision or {})},
        **top,
    }
    raw["vision_config"] = {name: value for name, value in raw["vision_config"].items() if value is not None}
    return raw


def test_released_scout_as_written_by_transformers_4() -> None:
    scaling = {
        "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip
    text = {
        "rope_theta": 500000.0, "rope_scaling": scaling, "no_rope_layers": [], "torch_dtype": "bfloat16",
        "attn_temperature_tuning": 4, "for_llm_compressor": False, "max_position_embeddings": 10485760,
        "eos_token_id": [200001, 200007, 200008],
    }  # fmt: skip
    config = parse_config(multimodal(text, torch_dtype="bfloat16"))
    assert config.moe_layers == tuple(range(48))
    assert [layer for layer, rotates in enumerate(config.rope_layers) if not rotates] == list(range(3, 48, 4))
    assert config.chunked_layers == config.rope_layers
    assert (config.rope_theta, config.dtype, config.attn_temperature_tuning) == (500000.0, "bfloat16", True)
    assert config.rope_scaling == RopeScaling(
        factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position=8192
    )
    assert config.eos_token_ids == (200001, 200007, 200008)
    assert (config.image_token_id, config.boi_token_id, config.eoi_token_id) == (200092, 200080, 200081)
    assert config.vision == VisionConfig(
        tile_size=336, patch_size=14, shuffle=2, hidden_size=1408, num_layers=34, num_heads=16, mlp_size=5632,
        adapter_size=4096, rope_theta=10000.0,
    )  # fmt: skip
    assert (config.vision.head_dim, config.vision.tokens_per_tile) == (88, 144)


def test_both_spellings_are_the_same_config() -> None:
    """What 5 writes of the same model: one dict of rope parameters per part, `dtype`, computed lists."""
    old = multimodal({"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float16"}, {"rope_theta": 77.0})
    new = multimodal(
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "moe_layers": list(range(48)),
            "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(48)],
            "layer_types": ["full_attention" if layer % 4 == 3 else "chunked_attention" for layer in range(48)],
        },
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        dtype="float16",
    )
    assert parse_config(old) == parse_config(new)
    assert parse_config(new).rope_theta == 10000.0


def test_guard_is_dense_and_never_chunked() -> None:
    config = parse_config(
        multimodal(
            {
                "num_local_experts": 0, "num_experts_per_tok": 0, "interleave_moe_layer_step": 0, "moe_layers": [],
                "no_rope_layer_interval": 80, "attention_chunk_size": None, "intermediate_size_mlp": 8192,
            }
        )
    )  # fmt: skip
    assert config.moe_layers == ()
    assert all(config.rope_layers)
    assert config.chunk_size is None


def test_missing_fields_are_those_of_transformers_classes() -> None:
    """A default tower cannot run, its widths contradict each other: two of them are set."""
    vision = {"hidden_size": 1408, "vision_output_dim": 4096}
    theirs = Llama4Config(text_config={}, vision_config=dict(vision)).to_dict()
    ours = parse_config({"model_type": "llama4", "text_config": {"eos_token_id": 2}, "vision_config": vision})
    assert ours == parse_config(theirs)
    assert ours.vision is not None
    assert (ours.vision.tile_size, ours.vision.tokens_per_tile) == (448, 256)


def test_text_only_folder() -> None:
    config = parse_config({"model_type": "llama4_text", "num_hidden_layers": 4})
    assert (config.tensor_prefix, config.vision) == ("", None)


def test_multimodal_folder_without_a_tower_is_text() -> None:
    assert parse_config({"model_type": "llama4", "text_config": {}, "vision_config": None}).vision is None


def test_special_tokens_by_either_name() -> None:
    config = parse_config(multimodal(image_token_id=7, boi_token_index=5, eoi_token_id=6))
    assert (config.image_token_id, config.boi_token_id, config.eoi_token_id) == (7, 5, 6)


@pytest.mark.parametrize(("beside", "inside", "tied"), [(True, False, False), (False, True, True), (True, True, True)])
def test_only_the_text_configs_flag_ties_embeddings(beside: bool, inside: bool, tied: bool) -> None:
    config = parse_config(multimodal({"tie_word_embeddings": inside}, tie_word_embeddings=beside))
    assert config.tie_word_embeddings is tied


def test_old_rope_scaling_wins_over_parameters() -> None:
    """As in transformers, whose theta then is the one beside it."""
    text = {
        "rope_theta": 1000.0,
        "rope_scaling": {"rope_type": "default"},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
    }
    assert parse_config(multimodal(text)).rope_theta == 1000.0


@pytest.mark.parametrize(
    ("value", "on"), [(True, True), (False, False), (None, False), (0, False), (1, True), (4, True)]
)
def test_temperature_tuning_is_a_switch_that_some_write_as_a_number(value: object, on: bool) -> None:
    assert parse_config(multimodal({"attn_temperature_tuning": value})).attn_temperature_tuning is on


def test_without_a_dtype_the_weights_decide() -> None:
    assert parse_config(multimodal()).dtype is None


NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
HUGE = 10**400


def refusals(build: Callable[[Raw], Raw], changes: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(build({name: value}), name, id=f"{name}={value}") for name in changes for value in changes[name]
    ]


TEXT_REFUSED: dict[str, list[Any]] = {
    "hidden_act": ["gelu", None],
    "attention_bias": [True],
    "num_hidden_layers": [0, "4", 4.0, True],
    "num_attention_heads": [0],
    "num_key_value_heads": [3],
    "head_dim": [7],
    "num_local_experts": [0, -1],
    "num_experts_per_tok": [0, 17],
    "moe_layers": ["all", [-1], [0.5]],
    "no_rope_layers": [[1, 0], [2] * 48],
    "layer_types": [["sliding_attention"] * 48, ["full_attention"]],
    "interleave_moe_layer_step": [0],
    "attention_chunk_size": [0],
    "rms_norm_eps": [math.nan, math.inf, "small", HUGE],
    "attn_scale": [HUGE],
    "attn_temperature_tuning": ["false", "true", "", -1, 0.5, [], {}],
    "quantization_config": [{"quant_method": "compressed-tensors"}],
    "rope_parameters": [NESTED, {"rope_type": "default", **NESTED}, {"rope_kind": "llama3"}],
    "rope_scaling": [NESTED],
    "torch_dtype": ["float64", "fp8"],
    "eos_token_id": ["</s>", [-1]],
    "tie_word_embeddings": ["yes"],
    "use_qk_norm": [1],
}
VISION_REFUSED: dict[str, list[Any]] = {
    "model_type": ["clip_vision_model"],
    "hidden_act": ["quick_gelu"],
    "multi_modal_projector_bias": [True],
    "num_channels": [1, 4],
    "image_size": [335, [336, 336]],
    "patch_size": [0, 14.0],
    "pixel_shuffle_ratio": [0.3, 0.0, 2.0, 1 / 5, "half", HUGE],
    "hidden_size": [1400, 1416],
    "intermediate_size": [4096],
    "projector_input_dim": [2048],
    "vision_output_dim": [7680],
    "num_hidden_layers": [0],
    "rope_parameters": [[1], {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}],
}


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        *refusals(multimodal, TEXT_REFUSED),
        *refusals(lambda change: multimodal(vision=change), VISION_REFUSED),
        pytest.param({"model_type": "llama"}, "model_type", id="llama"),
        pytest.param({"model_type": "llama4", "text_config": None}, "text_config", id="no text"),
        pytest.param(multimodal() | {"vision_config": 3}, "vision_config", id="no tower"),
        pytest.param(multimodal(quantization_config={"quant_method": "fp8"}), "quantization_config", id="fp8"),
        pytest.param(multimodal(image_token_index="<|patch|>"), "image_token_index", id="image token"),
        pytest.param(multimodal({"rope_scaling": {"rope_type": "yarn"}}), "rope_type", id="yarn"),
        pytest.param(multimodal({"rope_scaling": {"rope_type": "llama3"}}), "factor", id="no factor"),
        *(
            pytest.param(multimodal({"rope_parameters": {"rope_type": "llama3", name: HUGE}}), name, id=f"huge {name}")
            for name in ("rope_theta", "factor", "partial_rotary_factor")
        ),
        pytest.param(
            multimodal({"rope_parameters": LLAMA3, "original_max_position_embeddings": None}),
            "original_max_position_embeddings",
            id="no original length",
        ),
        pytest.param(multimodal({"partial_rotary_factor": 0.5}), "partial_rotary_factor", id="partly rotated"),
    ],
)
def test_refused_by_the_fields_name(raw: Raw, field: str) -> None:
    with pytest.raises(InvalidInput) as error:
        parse_config(raw)
    assert error.value.field.split(".")[-1] == field
