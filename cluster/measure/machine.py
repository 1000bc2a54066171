"""What this machine can do at most, measured now: read memory, multiply matrices.

Both drift (other tenants, clocks), so they are measured in the run that is compared with them.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

import experts.kernels
from experts.kernels.compiler import load
from experts.kernels.helpers import release_helpers
from experts.kernels.native import choose_arithmetic

READ_BYTES = (64 << 20, 2 << 30)
"""Least and most of a buffer: a smaller one would lie in the cache, a larger one tells nothing new."""
REPEATS = 5
MATMUL_SHAPES = ((2048, 2560, 1024), (2048, 4096, 4096))
"""Rows, outputs, inputs."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Bytes read per second and floating point operations (two per product) per second, with all of its threads."""

    read_bytes_per_s: float
    flops_per_s: float
    threads: int

    def mean(self, other: Machine) -> Machine:
        """What the machine was between two measurements."""
        return replace(
            self,
            read_bytes_per_s=(self.read_bytes_per_s + other.read_bytes_per_s) / 2,
            flops_per_s=(self.flops_per_s + other.flops_per_s) / 2,
        )

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The least time of one operation."""
        return max(num_bytes / self.read_bytes_per_s, flops / self.flops_per_s)


def measure_machine(
    *, num_bytes: int, dtype: torch.dtype, threads: int, device: torch.device = torch.device("cpu")
) -> Machine:
    """Measure reading on a buffer of `num_bytes`, about what a step reads, and products in `dtype`, on `device`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Machine(
            read_bytes_per_s=_read_rate(min(max(num_bytes, READ_BYTES[0]), READ_BYTES[1]), device),
            flops_per_s=max(_matmul_rate(shape, dtype, device) for shape in MATMUL_SHAPES),
            threads=threads,
        )
    finally:
        torch.set_num_threads(before)
        release_helpers()


def _read_rate(num_bytes: int, device: torch.device) -> float:
    buffer = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    library = _probe() if device.type == "cpu" else None
    if library is None:
        read: Callable[[], object] = buffer.sum
    else:
        read = partial(library.herd_read, buffer.data_ptr(), num_bytes, torch.get_num_threads())
    return num_bytes / _median_s(read, device)


def _matmul_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Of whichever kernel of ours or of torch is faster: a floor that torch alone could not reach is none."""
    rows, outputs, inputs = shape
    x = torch.ones(rows, inputs, dtype=dtype, device=device)
    weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
    ours = choose_arithmetic(dtype, device)
    best = min(
        _median_s(lambda: F.linear(x, weight), device),
        _median_s(lambda: ours.linear(x[:512], weight), device) * rows / 512,
    )
    return 2 * rows * outputs * inputs / best


def _median_s(action: Callable[[], object], device: torch.device) -> float:
    def finish() -> None:
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        finish()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@cache
def _probe() -> ctypes.CDLL | None:
    library = load(Path(experts.kernels.__path__[0]) / "probe.c")
    if library is not None:
        library.herd_read.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
        library.herd_read.restype = ctypes.c_float
    return library
