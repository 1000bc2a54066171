"""What the tests of compiled kernels need: the reason why they cannot run here, and the kernels' variants."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from experts.kernels.compiler import FLAGS, NEEDED, WITHOUT_AMX, cpu_flags
from experts.kernels.native import NativeArithmetic, load_norms, load_products


def reason_against() -> str:
    """Why nothing can be compiled and run here; empty where it can."""
    if not cpu_flags() >= NEEDED:
        return "this CPU lacks AVX512-BF16"
    return "" if shutil.which("cc") else "there is no C compiler"


needs_kernels = pytest.mark.skipif(bool(reason_against()), reason=reason_against() or "kernels can be compiled")

VARIANTS = {"with AMX": FLAGS, "without AMX": WITHOUT_AMX}


def native(variant: str) -> NativeArithmetic:
    """The arithmetic on products of a variant; skips, and says so, where the CPU has no AMX."""
    if variant == "with AMX" and "amx_bf16" not in cpu_flags():
        pytest.skip("this CPU lacks AMX")
    products, norms = load_products(VARIANTS[variant]), load_norms()
    assert products is not None and norms is not None and products.herd_prepare()
    return NativeArithmetic(products, norms)


class Unwanted(ctypes.CDLL):
    """A library none of whose functions may be called."""

    def __init__(self) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        raise AssertionError(f"{name} must not be called")


@dataclass
class Threads:
    """The number of torch's threads, set back in the end."""

    count: int

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal to the last bit, NaNs and signs of zeros included."""
    kind = {2: torch.int16, 4: torch.int32}[left.dtype.itemsize]
    return left.dtype == right.dtype and torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))
