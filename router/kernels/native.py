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

from experts.arithmetic import Arithmetic, TiledArithmetic
from experts.kernels.compiler import NUMBER, POINTER, REAL, THREADS, declare, load
from router.model.attend import Attend, FlashAttend, PlainAttend, Turn
from router.model.spans import Span
from router.model.tiled_attend import TiledAttend

MAX_HEADS_PER_GROUP, MAX_HEAD_DIM, STEP = 16, 256, 32
HERE = Path(__file__).parent


def choose_attend(dtype: torch.dtype, device: torch.device, arithmetic: Arithmetic) -> Attend:
    """The fastest way that this machine has; beside tiled arithmetic, the one whose bits depend on nothing but a query
    and the keys before it."""
    if isinstance(arithmetic, TiledArithmetic):
        return TiledAttend(arithmetic)
    if device.type != "cpu":
        return PlainAttend()
    decode, turn = (_decode(), _turn()) if dtype is torch.bfloat16 else (None, None)
    return FlashAttend() if decode is None or turn is None else NativeAttend(decode, turn)


class NativeAttend:
    """All sequences that decode in one call; prefills by torch."""

    def __init__(self, decode: ctypes.CDLL, turn: ctypes.CDLL) -> None:
        self._decode = decode
        self._turn = turn
        self._flash = FlashAttend()

    @property
    def functions(self) -> tuple[object, object]:
        """For callers in C: turn and decode."""
        return (self._turn.herd_turn, self._decode.herd_decode)

    def place(
        self,
        heads_TPD: torch.Tensor,
        num_queries: int,
        turn: Turn,
        keys_SGD: torch.Tensor,
        values_SGD: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> torch.Tensor:
        num_tokens, _, head_dim = heads_TPD.shape
        if head_dim % STEP:
            return self._flash.place(heads_TPD, num_queries, turn, keys_SGD, values_SGD, slots_T)
        heads_TPD = heads_TPD.contiguous()
        self._turn.herd_turn(
            heads_TPD.data_ptr(),
            None if turn.rotation is None else turn.rotation.data_ptr(),
            -1.0 if turn.norm_eps is None else turn.norm_eps,
            None if turn.temperature is None else turn.temperature.data_ptr(),
            keys_SGD.data_ptr(),
            values_SGD.data_ptr(),
            slots_T.data_ptr(),
            num_tokens,
            num_queries,
            keys_SGD.shape[1],
            head_dim,
            torch.get_num_threads(),
        )
        return heads_TPD[:, :num_queries]

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
        if query_TND.stride()[1:] != (head_dim, 1):
            query_TND = query_TND.contiguous()
        mixed_TND = query_TND.new_empty(query_TND.shape)
        self._fill_decodes(query_TND, mixed_TND, keys_SGD, values_SGD, spans[:num_decodes], chunked)
        self._flash.fill(mixed_TND, query_TND, keys_SGD, values_SGD, spans[num_decodes:], chunked)
        return mixed_TND

    def _fill_decodes(
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
        self._decode.herd_decode(
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
def _decode() -> ctypes.CDLL | None:
    """The compiled attention; None where the CPU or the compiler lacks something."""
    library = load(HERE / "decode.c")
    if library is not None:
        declare(library, "herd_decode", [POINTER, NUMBER, *[POINTER] * 6, NUMBER, NUMBER, NUMBER, NUMBER, THREADS])
    return library


@cache
def _turn() -> ctypes.CDLL | None:
    library = load(HERE / "turn.c")
    if library is not None:
        arguments = [POINTER, POINTER, REAL, *[POINTER] * 4, NUMBER, NUMBER, NUMBER, NUMBER, THREADS]
        declare(library, "herd_turn", arguments)
    return library
