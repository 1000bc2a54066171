"""Decoding attention by `decode.c`; everything else as `FlashAttend` does it.

Shape letters as in `router.model.attend`, B sequences.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch

from experts.kernels.compiler import load
from router.model.attend import Attend, FlashAttend, PlainAttend, TiledAttend
from router.model.spans import Span

MAX_HEADS_PER_GROUP, MAX_HEAD_DIM, STEP = 16, 256, 32


def choose_attend(dtype: torch.dtype, device: torch.device, *, deterministic: bool = False) -> Attend:
    """The fastest way that this machine has; with `deterministic`, the one whose bits depend on nothing but a query and
    the keys before it."""
    if deterministic:
        return TiledAttend()
    if device.type != "cpu":
        return PlainAttend()
    library = _library() if dtype is torch.bfloat16 else None
    return FlashAttend() if library is None else NativeAttend(library)


class NativeAttend:
    """All sequences that decode in one call; prefills by torch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._flash = FlashAttend()

    def __call__(
        self,
        query_TND: torch.Tensor,
        keys_SGD: torch.Tensor,
        values_SGD: torch.Tensor,
        spans: Sequence[Span],
        chunked: bool,
    ) -> torch.Tensor:
        num_heads, head_dim = query_TND.shape[1:]
        num_decodes = next((index for index, span in enumerate(spans) if span.count > 1), len(spans))
        fits = head_dim <= MAX_HEAD_DIM and not head_dim % STEP
        if not num_decodes or not fits or num_heads // keys_SGD.shape[1] > MAX_HEADS_PER_GROUP:
            return self._flash(query_TND, keys_SGD, values_SGD, spans, chunked)
        mixed_TND = query_TND.new_empty(query_TND.shape)
        self._decode(query_TND, mixed_TND, keys_SGD, values_SGD, spans[:num_decodes], chunked)
        self._flash.fill(mixed_TND, query_TND, keys_SGD, values_SGD, spans[num_decodes:], chunked)
        return mixed_TND

    def _decode(
        self,
        query_TND: torch.Tensor,
        mixed_TND: torch.Tensor,
        keys_SGD: torch.Tensor,
        values_SGD: torch.Tensor,
        spans: Sequence[Span],
        chunked: bool,
    ) -> None:
        """Write the first rows of `mixed_TND`, one for each span."""
        runs = [span.runs(chunked) for span in spans]
        flat = [run for of_one in runs for run in of_one]
        array = ctypes.c_long * len(flat)
        self._library.herd_decode(
            query_TND.data_ptr(),
            query_TND.stride(0),
            mixed_TND.data_ptr(),
            keys_SGD.data_ptr(),
            values_SGD.data_ptr(),
            array(*(run.start for run in flat)),
            array(*(len(run) for run in flat)),
            (ctypes.c_long * (len(spans) + 1))(0, *accumulate(map(len, runs))),
            len(spans),
            query_TND.shape[1],
            *keys_SGD.shape[1:],
            torch.get_num_threads(),
        )


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None where the CPU or the compiler lacks something."""
    library = load(Path(__file__).with_name("decode.c"))
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_long
        library.herd_decode.argtypes = [pointer, number, *[pointer] * 6, number, number, number, number, ctypes.c_int]
        library.herd_decode.restype = None
    return library
