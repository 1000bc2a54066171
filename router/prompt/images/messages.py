"""What the ingress and its decoding processes say to each other, in the frames of `frames`."""

from __future__ import annotations

import struct

from router.prompt.images.settings import ImageSettings
from router.prompt.images.tiles import CHANNELS, ImageTiles

READY = b"!"
"""Sent once, when the process may be asked."""
PICTURE = b"P"
"""A file, as the client sent it."""
TILES = b"T"
REFUSED = b"R"
"""JSON: [value, rule] of an InvalidInput."""
FAILED = b"F"
"""A traceback: the mistake is ours."""

MAX_TEXT_BYTES = 64 << 10

_HEAD = struct.Struct(">II32s")


def encode_tiles(tiles: ImageTiles) -> list[bytes]:
    return [_HEAD.pack(tiles.rows, tiles.cols, tiles.digest), tiles.pixels]


def decode_tiles(data: bytes | bytearray, settings: ImageSettings) -> ImageTiles:
    """Raises ValueError for what `settings` cannot have made."""
    if len(data) < _HEAD.size:
        raise ValueError("no head")
    rows, cols, digest = _HEAD.unpack_from(data)
    if not 1 <= rows * cols <= settings.max_patches:
        raise ValueError(f"a canvas of {rows}x{cols} tiles")
    tiles = ImageTiles(pixels=bytes(memoryview(data)[_HEAD.size :]), rows=rows, cols=cols, digest=digest)
    if len(tiles.pixels) != tiles.num_tiles * tile_bytes(settings):
        raise ValueError(f"{len(tiles.pixels)} bytes for {tiles.num_tiles} tiles")
    return tiles


def max_answer_bytes(settings: ImageSettings) -> int:
    """No answer is longer."""
    return max(_HEAD.size + (settings.max_patches + 1) * tile_bytes(settings), MAX_TEXT_BYTES)


def tile_bytes(settings: ImageSettings) -> int:
    return CHANNELS * settings.tile_size**2
