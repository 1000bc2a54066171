"""The vision tower in a checkpoint's configuration; knows no tensors and no images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experts.fields import MAX_LAYERS, Fields
from experts.rope_config import parse_rope

NUM_CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The tower that turns tiles of an image into tokens of the text decoder.

    A tile is `tile_size` pixels square, a patch `patch_size`; `shuffle` × `shuffle` neighbouring patches become one
    token. `mlp_size` is also the width of such a token before the adapter: hidden_size · shuffle².
    """

    tile_size: int
    patch_size: int
    shuffle: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    adapter_size: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        return (self.patches_per_side // self.shuffle) ** 2


def parse_vision(raw: Mapping[str, Any]) -> VisionConfig:
    """Turn the HF object `vision_config` into a VisionConfig; missing fields get the defaults of HF's class.

    Raises InvalidInput. `norm_eps`, feature selection and dropouts are read by no implementation and so ignored:
    the tower's norms use 1e-5.
    """
    fields = Fields(raw, where="vision_config.")
    _refuse_unsupported(fields)
    theta, scaling = parse_rope(fields, default_theta=10000.0, max_position=1)
    if scaling is not None:
        raise fields.error("rope_parameters", "must be of type default: the tower's angles are not scaled")
    config = VisionConfig(
        tile_size=fields.integer("image_size", 448),
        patch_size=fields.integer("patch_size", 14),
        shuffle=_shuffle(fields),
        hidden_size=fields.integer("hidden_size", 768),
        num_layers=fields.integer("num_hidden_layers", 34, high=MAX_LAYERS),
        num_heads=fields.integer("num_attention_heads", 16),
        mlp_size=fields.integer("intermediate_size", 5632),
        adapter_size=fields.integer("projector_output_dim", 4096),
        rope_theta=theta,
    )
    _check_together(fields, config)
    return config


def _refuse_unsupported(fields: Fields) -> None:
    kind = fields.get("model_type", "llama4_vision_model")
    if kind != "llama4_vision_model":
        raise fields.error("model_type", "must be llama4_vision_model")
    # HF computes the exact GELU whatever stands here: a file that asks for another function contradicts its weights.
    if fields.get("hidden_act", "gelu") != "gelu":
        raise fields.error("hidden_act", "only gelu is supported")
    if fields.get("multi_modal_projector_bias"):
        raise fields.error("multi_modal_projector_bias", "a projector with bias is not supported")
    if fields.integer("num_channels", NUM_CHANNELS) != NUM_CHANNELS:
        raise fields.error("num_channels", f"must be {NUM_CHANNELS}")


def _shuffle(fields: Fields) -> int:
    ratio = fields.positive("pixel_shuffle_ratio", 0.5)
    shuffle = max(1, round(1 / ratio))
    if abs(ratio * shuffle - 1) > 1e-9:
        raise fields.error("pixel_shuffle_ratio", "must be 1 divided by a whole number")
    return shuffle


def _check_together(fields: Fields, config: VisionConfig) -> None:
    if config.tile_size % config.patch_size:
        raise fields.error("image_size", f"must be a multiple of patch_size {config.patch_size}")
    if config.patches_per_side % config.shuffle:
        raise fields.error("pixel_shuffle_ratio", f"must divide {config.patches_per_side} patches evenly")
    if config.hidden_size % config.num_heads or config.head_dim % 4:
        rule = f"must be {config.num_heads} attention heads times a multiple of 4"
        raise fields.error("hidden_size", rule)
    wide = config.hidden_size * config.shuffle**2
    if config.mlp_size != wide:
        raise fields.error("intermediate_size", f"must be hidden_size / pixel_shuffle_ratio², here {wide}")
    for name, default in (("projector_input_dim", 4096), ("vision_output_dim", 7680)):
        if fields.integer(name, default) != config.adapter_size:
            raise fields.error(name, f"must equal projector_output_dim {config.adapter_size}")
