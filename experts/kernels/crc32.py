"""CRC-32 as zlib computes it; long buffers several times as fast where the CPU allows."""

from __future__ import annotations

import ctypes
import zlib
from functools import cache
from pathlib import Path

from experts.kernels.compiler import NUMBER, POINTER, load

Bytes = bytes | memoryview | ctypes.Array[ctypes.c_char]

LONG = 1 << 15
"""Bytes from which the call into C pays."""
NEEDED = frozenset({"pclmulqdq", "sse4_1"})


def crc32(data: Bytes, begin: int = 0) -> int:
    """CRC-32 of `data` from byte `begin` on. Views (their items bytes) are left to zlib: ctypes does not tell where
    they are."""
    num_bytes = len(data) - begin
    library = _library() if num_bytes >= LONG and not isinstance(data, memoryview) else None
    if library is None:
        return zlib.crc32(memoryview(data)[begin:])
    checksum: int = library.herd_crc32(data, begin, num_bytes)
    return checksum


@cache
def _library() -> ctypes.CDLL | None:
    library = load(Path(__file__).with_name("crc32.c"), needed=NEEDED)
    if library is not None:
        library.herd_crc32.argtypes = [POINTER, NUMBER, NUMBER]
        library.herd_crc32.restype = ctypes.c_uint
    return library
