"""What glibc's allocator of this process does with large blocks once they are freed. Elsewhere nothing is done."""

from __future__ import annotations

import ctypes
from contextlib import suppress

LARGE_BYTES = 1 << 20

_M_MMAP_THRESHOLD = -3
"""glibc's number of this parameter of mallopt."""


def return_large_blocks() -> None:
    """From now on blocks of `LARGE_BYTES` and more go back to the system as soon as they are freed.

    Left alone, glibc learns from the first such block to keep those of its size, up to 32 MiB, on heaps that
    fragment and seldom shrink: request bodies and decoded pictures would stay in memory for good.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
