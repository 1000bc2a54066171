"""One checksum, however it is computed."""

from __future__ import annotations

import ctypes
import random
import zlib

import pytest

from experts.kernels import crc32 as module
from experts.kernels.compiler import cpu_flags
from experts.kernels.crc32 import LONG, NEEDED, crc32

needs_products = pytest.mark.skipif(
    not cpu_flags() >= NEEDED or module._library() is None, reason="this CPU or the compiler lacks something"
)


@needs_products
@pytest.mark.parametrize("num_bytes", [*range(LONG, LONG + 260), 5 * LONG + 17, 1 << 21])
def test_long_buffers_have_the_checksum_that_zlib_computes(num_bytes: int) -> None:
    data = random.Random(num_bytes).randbytes(num_bytes)
    assert crc32(data) == zlib.crc32(data)
    assert crc32(data, 1) == zlib.crc32(data[1:])
    assert crc32((ctypes.c_char * num_bytes).from_buffer_copy(data), 3) == zlib.crc32(data[3:])


@pytest.mark.parametrize("num_bytes", [0, 1, 64, LONG - 1, LONG, LONG + 1])
def test_without_the_instructions_it_is_the_same(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    data = random.Random(num_bytes).randbytes(num_bytes)
    expected = crc32(data)
    monkeypatch.setattr(module, "_library", lambda: None)
    assert crc32(data) == expected == zlib.crc32(data)
