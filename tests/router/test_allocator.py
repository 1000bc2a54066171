"""Large blocks that were freed leave the process; in processes of their own, since the setting stays."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes
from router.allocator import return_large_blocks

class Numbers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "a b c d mapped f g h i j".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Numbers
{first}
bytearray(30_000_000)
before = libc.mallinfo2().mapped
body = bytearray(20_000_000)
print(libc.mallinfo2().mapped - before >= 20_000_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize(("first", "expected"), [("return_large_blocks()", "True"), ("", "False")])
def test_blocks_after_a_large_one_are_mapped_alone(first: str, expected: str) -> None:
    command = [sys.executable, "-c", SCRIPT.replace("{first}", first)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == expected
