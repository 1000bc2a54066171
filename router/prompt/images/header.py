"""Format and size of a picture from its first bytes, before anything is decoded. Knows four formats, by content."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from experts.errors import InvalidInput
from router.prompt.images.limits import ImageLimits

DAMAGED = "cannot be decoded: the file is damaged or cut off"

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG frame header; the three others of this range are tables."""
_JPEG_BARE = frozenset(range(0xD0, 0xD9)) | {0x01}
"""Markers without a length."""
_JPEG_ENDS = frozenset((0xD9, 0xDA))
_JPEG_MAX_SEGMENTS = 4096


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """`kind` is "PNG", "JPEG", "WebP" or "GIF"; the size is in pixels, as stored, before any rotation."""

    kind: str
    width: int
    height: int


def read_header(data: bytes, limits: ImageLimits, field: str) -> ImageHeader:
    """What the file `data` says of itself. Raises InvalidInput(field) for other formats, damage and excess."""
    if len(data) > limits.max_bytes:
        raise InvalidInput(field, f"{len(data)} bytes", f"an image may have at most {limits.max_bytes} bytes")
    kind = _kind(data)
    if kind is None:
        raise InvalidInput(field, f"{len(data)} bytes", "must be a PNG, JPEG, WebP or GIF image")
    try:
        width, height = _SIZES[kind](data)
    except (struct.error, ValueError):
        raise InvalidInput(field, kind, DAMAGED) from None
    check_size(kind, width, height, limits, field)
    return ImageHeader(kind=kind, width=width, height=height)


def check_size(kind: str, width: int, height: int, limits: ImageLimits, field: str) -> None:
    """Raise InvalidInput(field) for a picture that has no pixels, or too many, or too long a side."""
    shown = f"{kind} of {width} by {height} pixels"
    if width < 1 or height < 1:
        raise InvalidInput(field, shown, "an image must have at least one pixel")
    if max(width, height) > limits.max_side:
        raise InvalidInput(field, shown, f"each side of an image may have at most {limits.max_side} pixels")
    if width * height > limits.max_pixels:
        raise InvalidInput(field, shown, f"an image may have at most {limits.max_pixels} pixels")


def _kind(data: bytes) -> str | None:
    if data.startswith(_PNG):
        return "PNG"
    if data.startswith(_JPEG):
        return "JPEG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    return None


def _png_size(data: bytes) -> tuple[int, int]:
    length, name, width, height = struct.unpack_from(">I4sII", data, len(_PNG))
    if name != b"IHDR" or length != 13:
        raise ValueError
    return width, height


def _gif_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    """Of the canvas, where the file has one, else of its only frame."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return 1 + low_w + (high_w << 16), 1 + low_h + (high_h << 16)
    if chunk == b"VP8L":
        signature, bits = struct.unpack_from("<BI", data, 20)
        if signature != 0x2F:
            raise ValueError
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        start, width, height = struct.unpack_from("<3sHH", data, 23)
        if start != b"\x9d\x01\x2a":
            raise ValueError
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Of the first frame header; every segment before it says how long it is."""
    position = 2
    for _ in range(_JPEG_MAX_SEGMENTS):
        prefix, marker = struct.unpack_from(">BB", data, position)
        if prefix != 0xFF or marker in _JPEG_ENDS:
            raise ValueError
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return width, height
        position += _jpeg_step(data, position, marker)
    raise ValueError


def _jpeg_step(data: bytes, position: int, marker: int) -> int:
    if marker == 0xFF:
        # A fill byte.
        return 1
    if marker in _JPEG_BARE:
        return 2
    (length,) = struct.unpack_from(">H", data, position + 2)
    if length < 2:
        raise ValueError
    return int(2 + length)


_SIZES = {"PNG": _png_size, "JPEG": _jpeg_size, "GIF": _gif_size, "WebP": _webp_size}
