"""The configuration of a checkpoint, read from its HF `config.json` in both spellings; knows no tensors.

Fields that would change the function and are not supported are refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.errors import CheckpointError, InvalidInput
from experts.fields import MAX_LAYERS, Fields, is_int
from experts.model_files import read_json
from experts.rope_config import RopeScaling, parse_rope
from experts.vision_config import VisionConfig, parse_vision

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One checkpoint: its text decoder and, where it can see, its vision tower. Tuples are indexed by layer.

    `rope_layers`: the layer rotates queries and keys (and normalises them, if `use_qk_norm`).
    `chunked_layers`: the layer sees only its current attention chunk; with `attention_chunk_size` None it sees all.
    `vision` is None for a text-only model. `image_token_id` marks the places that take an image's features;
    `boi_token_id` and `eoi_token_id` stand before and after an image.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    expert_size: int
    dense_size: int
    num_experts: int
    experts_per_token: int
    moe_layers: tuple[int, ...]
    rope_layers: tuple[bool, ...]
    chunked_layers: tuple[bool, ...]
    attention_chunk_size: int | None
    use_qk_norm: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    attn_temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    max_position: int
    tie_word_embeddings: bool
    dtype: str | None
    """None where the file does not say: that of the weights."""
    tensor_prefix: str
    """What precedes `model.` in tensor names: "language_model." or ""."""
    eos_token_ids: tuple[int, ...]
    vision: VisionConfig | None
    image_token_id: int
    boi_token_id: int
    eoi_token_id: int

    @property
    def chunk_size(self) -> int | None:
        """Tokens per attention chunk where any layer is chunked at all, else None."""
        return self.attention_chunk_size if any(self.chunked_layers) else None


def load_config(model_dir: Path) -> ModelConfig:
    """Read `model_dir/config.json`. Raises CheckpointError naming the file and field."""
    raw = read_json(model_dir / "config.json")
    if raw is None:
        raise CheckpointError("config.json", "the file is missing")
    try:
        return parse_config(raw)
    except InvalidInput as error:
        raise CheckpointError("config.json", str(error)) from error


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Turn the HF config `raw` (multimodal or text-only) into a ModelConfig. Raises InvalidInput."""
    kind = raw.get("model_type")
    if kind == "llama4":
        text = raw.get("text_config")
        if not isinstance(text, Mapping):
            raise InvalidInput("text_config", text, "must be an object")
        prefix, vision = "language_model.", _vision(raw)
    elif kind == "llama4_text":
        text, prefix, vision = raw, "", None
    else:
        raise InvalidInput("model_type", kind, "must be llama4 or llama4_text")
    _refuse_unsupported(raw, text)
    return _build(Fields(text), Fields(raw), prefix, vision)


def _vision(raw: Mapping[str, Any]) -> VisionConfig | None:
    """A multimodal folder without the object is served as text."""
    part = raw.get("vision_config")
    if part is None:
        return None
    if not isinstance(part, Mapping):
        raise InvalidInput("vision_config", part, "must be an object or null")
    return parse_vision(part)


def _build(fields: Fields, top: Fields, prefix: str, vision: VisionConfig | None) -> ModelConfig:
    num_layers = fields.integer("num_hidden_layers", 48, high=MAX_LAYERS)
    num_heads = fields.integer("num_attention_heads", 40)
    num_kv_heads = fields.integer("num_key_value_heads", 8, null=num_heads)
    hidden_size = fields.integer("hidden_size", 5120)
    num_experts = fields.integer("num_local_experts", 16, low=0)
    if num_heads % num_kv_heads:
        raise InvalidInput("num_key_value_heads", num_kv_heads, f"must divide num_attention_heads {num_heads}")
    rope_layers = _rope_layers(fields, num_layers)
    max_position = fields.integer("max_position_embeddings", 131072)
    theta, scaling = parse_rope(fields, default_theta=500000.0, max_position=max_position)
    config = ModelConfig(
        vocab_size=fields.integer("vocab_size", 202048),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.integer("head_dim", 128, null=hidden_size // num_heads),
        expert_size=fields.integer("intermediate_size", 8192),
        dense_size=fields.integer("intermediate_size_mlp", 16384),
        num_experts=num_experts,
        experts_per_token=fields.integer("num_experts_per_tok", 1, low=0),
        moe_layers=_moe_layers(fields, num_layers),
        rope_layers=rope_layers,
        chunked_layers=_chunked_layers(fields, rope_layers),
        attention_chunk_size=fields.optional_integer("attention_chunk_size", 8192),
        use_qk_norm=fields.boolean("use_qk_norm", True),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        attn_temperature_tuning=fields.switch("attn_temperature_tuning", True),
        floor_scale=fields.integer("floor_scale", 8192),
        attn_scale=fields.number("attn_scale", 0.1),
        max_position=max_position,
        # The flag beside text_config ties nothing.
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        dtype=_dtype(fields, top),
        tensor_prefix=prefix,
        eos_token_ids=token_ids("eos_token_id", fields.get("eos_token_id", ())),
        vision=vision,
        image_token_id=_special_token(top, "image_token", 200092),
        boi_token_id=_special_token(top, "boi_token", 200080),
        eoi_token_id=_special_token(top, "eoi_token", 200081),
    )
    _check_together(config)
    return config


def _check_together(config: ModelConfig) -> None:
    if config.head_dim % 2:
        raise InvalidInput("head_dim", config.head_dim, "must be even")
    if config.moe_layers and config.num_experts < 1:
        raise InvalidInput("num_local_experts", config.num_experts, "must be ≥ 1 where moe_layers is not empty")
    if config.moe_layers and not 1 <= config.experts_per_token <= config.num_experts:
        raise InvalidInput(
            "num_experts_per_tok",
            config.experts_per_token,
            f"must be at least 1 and at most num_local_experts {config.num_experts}",
        )


def _refuse_unsupported(raw: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    for part in (raw, text):
        if part.get("quantization_config"):
            rule = "quantized weights are not supported"
            raise InvalidInput("quantization_config", part["quantization_config"], rule)
    act = text.get("hidden_act", "silu")
    if act != "silu":
        raise InvalidInput("hidden_act", act, "only silu is supported")
    if text.get("attention_bias"):
        raise InvalidInput("attention_bias", text["attention_bias"], "attention with bias is not supported")


def _rope_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """`no_rope_layers` reads the other way round: 1 means the layer does rotate."""
    listed = fields.get("no_rope_layers")
    if not listed:
        interval = fields.integer("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if not isinstance(listed, list) or len(listed) < num_layers or any(flag not in (0, 1) for flag in listed):
        raise InvalidInput("no_rope_layers", listed, f"must list 0 or 1 for each of {num_layers} layers")
    return tuple(bool(flag) for flag in listed[:num_layers])


def _chunked_layers(fields: Fields, rope_layers: tuple[bool, ...]) -> tuple[bool, ...]:
    kinds = fields.get("layer_types")
    if kinds is None:
        return rope_layers
    known = ("chunked_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) < len(rope_layers) or any(kind not in known for kind in kinds):
        raise InvalidInput("layer_types", kinds, f"must list {' or '.join(known)} for each layer")
    return tuple(kind == "chunked_attention" for kind in kinds[: len(rope_layers)])


def _moe_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """An explicit `[]` means dense everywhere and is not the same as a missing list."""
    listed = fields.get("moe_layers")
    if listed is None:
        step = fields.integer("interleave_moe_layer_step", 1)
        return tuple(range(step - 1, num_layers, step))
    if not isinstance(listed, list) or any(not is_int(layer) or layer < 0 for layer in listed):
        raise InvalidInput("moe_layers", listed, "must list layer numbers")
    return tuple(sorted({layer for layer in listed if layer < num_layers}))


def _special_token(top: Fields, name: str, default: int) -> int:
    """A token id under either of the names that HF reads."""
    return top.integer(f"{name}_index", top.integer(f"{name}_id", default, low=0), low=0)


def _dtype(fields: Fields, top: Fields) -> str | None:
    for source in (fields, top):
        for name in ("dtype", "torch_dtype"):
            value = source.get(name)
            if value is None:
                continue
            name_only = str(value).removeprefix("torch.")
            if name_only not in DTYPES:
                raise InvalidInput(name, value, f"must be one of {', '.join(DTYPES)}")
            return name_only
    return None


def token_ids(field: str, value: object) -> tuple[int, ...]:
    """A token id, a list of them or null, as a tuple."""
    listed = [] if value is None else [value] if is_int(value) else value
    if not isinstance(listed, list | tuple) or any(not is_int(token) or token < 0 for token in listed):
        raise InvalidInput(field, value, "must be a token id or a list of token ids")
    return tuple(listed)
