"""The configuration of a checkpoint, read from its HF `config.json` in both spellings; knows no tensors.

Fields that would change the function and are not supported are refused by name, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.errors import CheckpointError, InvalidInput

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of type "llama3": long wavelengths are divided by `factor`, a band between is smoothed."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The text decoder of one checkpoint. Tuples are indexed by layer.

    `rope_layers`: the layer rotates queries and keys (and normalises them, if `use_qk_norm`).
    `chunked_layers`: the layer sees only its current attention chunk; with `attention_chunk_size` None it sees all.
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
    dtype: str
    tensor_prefix: str
    """What precedes `model.` in tensor names: "language_model." or ""."""
    eos_token_ids: tuple[int, ...]

    @property
    def chunk_size(self) -> int | None:
        """Tokens per attention chunk where any layer is chunked at all, else None."""
        return self.attention_chunk_size if any(self.chunked_layers) else None


def load_config(model_dir: Path) -> ModelConfig:
    """Read `model_dir/config.json`. Raises CheckpointError naming the file and field."""
    raw = read_json(model_dir / "config.json")
    try:
        return parse_config(raw)
    except InvalidInput as error:
        raise CheckpointError("config.json", str(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; anything else is a CheckpointError that names the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path.name, "the file is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(path.name, f"cannot be read as JSON: {type(error).__name__}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(path.name, "must hold a JSON object")
    return raw


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Turn the HF config `raw` (multimodal or text-only) into a ModelConfig. Raises InvalidInput."""
    kind = raw.get("model_type")
    if kind == "llama4":
        text = raw.get("text_config")
        if not isinstance(text, Mapping):
            raise InvalidInput("text_config", text, "must be an object")
        prefix = "language_model."
    elif kind == "llama4_text":
        text, prefix = raw, ""
    else:
        raise InvalidInput("model_type", kind, "must be llama4 or llama4_text")
    fields = _Fields(text)
    _refuse_unsupported(text)
    return _build(fields, raw, prefix)


def _build(fields: _Fields, raw: Mapping[str, Any], prefix: str) -> ModelConfig:
    num_layers = fields.integer("num_hidden_layers", 48)
    num_heads = fields.integer("num_attention_heads", 40)
    num_kv_heads = fields.integer("num_key_value_heads", 8, null=num_heads)
    hidden_size = fields.integer("hidden_size", 5120)
    num_experts = fields.integer("num_local_experts", 16, low=0)
    if num_heads % num_kv_heads:
        raise InvalidInput("num_key_value_heads", num_kv_heads, f"must divide num_attention_heads {num_heads}")
    rope_layers = _rope_layers(fields, num_layers)
    theta, scaling = _rope(fields)
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
        experts_per_token=fields.integer("num_experts_per_tok", 1),
        moe_layers=_moe_layers(fields, num_layers),
        rope_layers=rope_layers,
        chunked_layers=_chunked_layers(fields, rope_layers),
        attention_chunk_size=fields.optional_integer("attention_chunk_size", 8192),
        use_qk_norm=fields.boolean("use_qk_norm", True),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        attn_temperature_tuning=bool(fields.get("attn_temperature_tuning", True)),
        floor_scale=fields.integer("floor_scale", 8192),
        attn_scale=fields.number("attn_scale", 0.1),
        max_position=fields.integer("max_position_embeddings", 131072),
        tie_word_embeddings=_tied(fields, raw),
        dtype=_dtype(fields, raw),
        tensor_prefix=prefix,
        eos_token_ids=token_ids("eos_token_id", fields.get("eos_token_id", ())),
    )
    _check_together(config)
    return config


def _check_together(config: ModelConfig) -> None:
    if config.head_dim % 2:
        raise InvalidInput("head_dim", config.head_dim, "must be even")
    if config.moe_layers and config.num_experts < 1:
        raise InvalidInput("num_local_experts", config.num_experts, "must be ≥ 1 where moe_layers is not empty")
    if config.moe_layers and config.experts_per_token > config.num_experts:
        raise InvalidInput(
            "num_experts_per_tok", config.experts_per_token, f"must be ≤ num_local_experts {config.num_experts}"
        )


def _refuse_unsupported(text: Mapping[str, Any]) -> None:
    act = text.get("hidden_act", "silu")
    if act != "silu":
        raise InvalidInput("hidden_act", act, "only silu is supported")
    if text.get("attention_bias"):
        raise InvalidInput("attention_bias", text["attention_bias"], "attention with bias is not supported")


def _rope_layers(fields: _Fields, num_layers: int) -> tuple[bool, ...]:
    """`no_rope_layers` reads the other way round: 1 means the layer does rotate."""
    listed = fields.get("no_rope_layers")
    if not listed:
        interval = fields.integer("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if not isinstance(listed, list) or len(listed) < num_layers or any(flag not in (0, 1) for flag in listed):
        raise InvalidInput("no_rope_layers", listed, f"must list 0 or 1 for each of {num_layers} layers")
    return tuple(bool(flag) for flag in listed[:num_layers])


def _chunked_layers(fields: _Fields, rope_layers: tuple[bool, ...]) -> tuple[bool, ...]:
    kinds = fields.get("layer_types")
    if kinds is None:
        return rope_layers
    known = ("chunked_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) < len(rope_layers) or any(kind not in known for kind in kinds):
        raise InvalidInput("layer_types", kinds, f"must list {' or '.join(known)} for each layer")
    return tuple(kind == "chunked_attention" for kind in kinds[: len(rope_layers)])


def _moe_layers(fields: _Fields, num_layers: int) -> tuple[int, ...]:
    """An explicit `[]` means dense everywhere and is not the same as a missing list."""
    listed = fields.get("moe_layers")
    if listed is None:
        step = fields.integer("interleave_moe_layer_step", 1)
        return tuple(range(step - 1, num_layers, step))
    if not isinstance(listed, list) or any(not _is_int(layer) or layer < 0 for layer in listed):
        raise InvalidInput("moe_layers", listed, "must list layer numbers")
    return tuple(sorted({layer for layer in listed if layer < num_layers}))


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """θ and scaling, from `rope_parameters` (v5) or `rope_theta` + `rope_scaling` (v4)."""
    merged: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = fields.get(name)
        if part is not None and not isinstance(part, Mapping):
            raise InvalidInput(name, part, "must be an object or null")
        merged.update(part or {})
    rope = _Fields({"rope_theta": fields.get("rope_theta", 500000.0), **merged}, where="rope_parameters.")
    theta = rope.number("rope_theta", 500000.0)
    kind = merged.get("rope_type", merged.get("type", "default"))
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise InvalidInput("rope_parameters.partial_rotary_factor", merged["partial_rotary_factor"], "must be 1")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InvalidInput("rope_parameters.rope_type", kind, "must be default or llama3")
    return theta, RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.integer(
            "original_max_position_embeddings", fields.integer("max_position_embeddings", 131072)
        ),
    )


def _tied(fields: _Fields, raw: Mapping[str, Any]) -> bool:
    return bool(raw.get("tie_word_embeddings", False)) or fields.boolean("tie_word_embeddings", False)


def _dtype(fields: _Fields, raw: Mapping[str, Any]) -> str:
    for source in (fields.raw, raw):
        for name in ("dtype", "torch_dtype"):
            value = source.get(name)
            if value is None:
                continue
            name_only = str(value).removeprefix("torch.")
            if name_only not in DTYPES:
                raise InvalidInput(name, value, f"must be one of {', '.join(DTYPES)}")
            return name_only
    return "bfloat16"


def token_ids(field: str, value: object) -> tuple[int, ...]:
    """A token id, a list of them or null, as a tuple."""
    listed = [] if value is None else [value] if _is_int(value) else value
    if not isinstance(listed, list | tuple) or any(not _is_int(token) or token < 0 for token in listed):
        raise InvalidInput(field, value, "must be a token id or a list of token ids")
    return tuple(listed)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _Fields:
    """Typed access to a JSON object; wrong types become InvalidInput with the field's full name."""

    def __init__(self, raw: Mapping[str, Any], where: str = "") -> None:
        self.raw = raw
        self._where = where

    def get(self, name: str, default: Any = None) -> Any:
        return self.raw.get(name, default)

    def integer(self, name: str, default: int, *, low: int = 1, null: int | None = None) -> int:
        value = self.raw.get(name, default)
        if value is None and null is not None:
            return null
        if not _is_int(value) or value < low:
            raise InvalidInput(self._where + name, value, f"must be an integer ≥ {low}")
        return int(value)

    def optional_integer(self, name: str, default: int) -> int | None:
        return None if self.raw.get(name, default) is None else self.integer(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise InvalidInput(self._where + name, value, "must be a finite number ≥ 0")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise InvalidInput(self._where + name, value, "must be true or false")
        return value
