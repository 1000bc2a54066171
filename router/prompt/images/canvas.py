"""Which canvas of tiles a picture goes on, and how large it is there. Arithmetic on sizes; no pixels.

All of it follows transformers' image processor to the last bit of its rounding, so that sizes always agree.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from router.prompt.images.settings import ImageSettings


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A canvas of `rows` x `cols` tiles, and the size in pixels of the picture at its top left."""

    rows: int
    cols: int
    width: int
    height: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the canvas, and the global one where that is not the only one."""
        return num_tiles(self.rows, self.cols)


def num_tiles(rows: int, cols: int) -> int:
    return rows * cols + (rows * cols > 1)


def lay_out(width: int, height: int, settings: ImageSettings) -> Layout:
    """Where a picture of `width` x `height` pixels goes."""
    rows, cols = _canvas(width, height, settings)
    box_h, cut_h = _box(height, rows, settings)
    box_w, cut_w = _box(width, cols, settings)
    scale_h, scale_w = _quotient(box_h, height, cut_h), _quotient(box_w, width, cut_w)
    if cut_h or cut_w:
        by_width = _float32(scale_w) < _float32(scale_h)
    else:
        by_width = scale_w < scale_h
    if by_width:
        box_h = min(math.floor(_product(height, scale_w, cut_w)), box_h)
    else:
        box_w = min(math.floor(_product(width, scale_h, cut_h)), box_w)
    return Layout(rows=rows, cols=cols, width=max(box_w, 1), height=max(box_h, 1))


def _canvas(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    """The canvas that needs the least enlarging, else the least shrinking; of several, the smallest."""
    tile = settings.tile_size
    canvases = _canvases(settings.max_patches)
    scales = [min(_float32(rows * tile / height), _float32(cols * tile / width)) for rows, cols in canvases]
    enlarging = [scale for scale in scales if scale >= 1]
    if enlarging and not settings.resize_to_max_canvas:
        best = min(enlarging)
    else:
        best = max(scales)
    return min(
        (canvas for canvas, scale in zip(canvases, scales, strict=True) if scale == best),
        key=lambda canvas: canvas[0] * canvas[1],
    )


@lru_cache(maxsize=8)
def _canvases(max_tiles: int) -> Sequence[tuple[int, int]]:
    """(rows, cols) of all canvases of up to `max_tiles` tiles."""
    return [
        (rows, count // rows) for count in range(max_tiles, 0, -1) for rows in range(1, count + 1) if count % rows == 0
    ]


def _box(side: int, tiles: int, settings: ImageSettings) -> tuple[int, bool]:
    """The room along one side, and whether the canvas is what limits it.

    transformers computes with tensors, which round to float32, exactly where the canvas sets the limit.
    """
    room = tiles * settings.tile_size
    wanted = max(side, settings.tile_size)
    if settings.resize_to_max_canvas or room < wanted:
        return room, True
    return wanted, False


def _quotient(box: int, side: int, rounds: bool) -> float:
    return _float32(box / side) if rounds else box / side


def _product(side: int, scale: float, rounds: bool) -> float:
    return _float32(side * scale) if rounds else side * scale


def _float32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded
