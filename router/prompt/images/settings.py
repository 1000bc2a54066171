"""How pictures are cut and counted for one checkpoint. Knows nothing of files."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CANVAS_TILES = 64


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """A canvas has at most `max_patches` tiles, `tile_size` pixels square; a tile becomes `tokens_per_tile` tokens.

    With `resize_to_max_canvas` a picture is enlarged as far as any canvas allows, otherwise never beyond one tile.
    """

    tile_size: int = 336
    tokens_per_tile: int = 144
    max_patches: int = 16
    resize_to_max_canvas: bool = False
