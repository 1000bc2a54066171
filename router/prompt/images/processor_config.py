"""How a checkpoint's processor files want pictures cut: the fields that change pixels or tokens.

A setting that we do not follow is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experts.errors import CheckpointError
from experts.model_files import read_json
from experts.vision_config import VisionConfig
from router.prompt.images.settings import MAX_CANVAS_TILES, ImageSettings

IMAGE_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"

_FIXED: Mapping[str, tuple[object, ...]] = {
    "do_convert_rgb": (True,),
    "do_normalize": (True,),
    "do_rescale": (True,),
    "do_resize": (True,),
    "image_mean": (0.5, [0.5, 0.5, 0.5]),
    "image_std": (0.5, [0.5, 0.5, 0.5]),
    "resample": (2,),
}
"""Fields with one meaning in Llama 4, which the router's arithmetic on pixels builds on. 2 is bilinear."""


def read_settings(model_dir: Path, vision: VisionConfig) -> ImageSettings:
    """What the folder's processor files say, where there are any. Raises CheckpointError naming file and field."""
    processor = read_json(model_dir / PROCESSOR_FILE) or {}
    _check_processor(processor, vision)
    # Newer folders keep the image processor's fields inside the processor's.
    nested = processor.get("image_processor")
    if isinstance(nested, Mapping):
        return _from_fields(nested, vision, PROCESSOR_FILE)
    return _from_fields(read_json(model_dir / IMAGE_FILE) or {}, vision, IMAGE_FILE)


def _from_fields(fields: Mapping[str, Any], vision: VisionConfig, file: str) -> ImageSettings:
    for name, meanings in _FIXED.items():
        value = fields.get(name)
        if value is not None and value not in meanings:
            raise CheckpointError(f"{file}: {name}", f"must be {meanings[0]!r}, is {value!r}")
    factor = fields.get("rescale_factor")
    if factor is not None and (not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6):
        raise CheckpointError(f"{file}: rescale_factor", f"must be 1/255, is {factor!r}")
    _check_size(fields.get("size"), vision.tile_size, f"{file}: size")
    return ImageSettings(
        tile_size=vision.tile_size,
        tokens_per_tile=vision.tokens_per_tile,
        max_patches=_max_patches(fields.get("max_patches"), f"{file}: max_patches"),
        resize_to_max_canvas=_flag(fields.get("resize_to_max_canvas"), f"{file}: resize_to_max_canvas"),
    )


def _check_processor(processor: Mapping[str, Any], vision: VisionConfig) -> None:
    """Tokens are counted from these two, features come from config.json: they must agree."""
    for name, told in (("patch_size", vision.patch_size), ("pixel_shuffle_ratio", 1 / vision.shuffle)):
        value = processor.get(name)
        if value is not None and value != told:
            raise CheckpointError(f"{PROCESSOR_FILE}: {name}", f"must be {told} as in config.json, is {value!r}")


def _check_size(size: object, tile_size: int, where: str) -> None:
    sides = [size.get("height"), size.get("width")] if isinstance(size, Mapping) else [size]
    if size is not None and any(side != tile_size for side in sides):
        raise CheckpointError(where, f"must be {tile_size} by {tile_size} as in config.json, is {size!r}")


def _max_patches(value: object, where: str) -> int:
    if value is None:
        return ImageSettings.max_patches
    if type(value) is not int or not 1 <= value <= MAX_CANVAS_TILES:
        raise CheckpointError(where, f"must be an integer in 1 ... {MAX_CANVAS_TILES}, is {value!r}")
    return value


def _flag(value: object, where: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(where, f"must be true or false, is {value!r}")
    return bool(value)
