"""Attention by `decode.c` and `prefill.c`; shapes that these do not take, as `FlashAttend` does it.

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
from experts.kernels.compiler import NUMBER, POINTER, REAL, THREADS, declare, load, prepared
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
    if dtype is not torch.bfloat16:
        return FlashAttend()
    decode, prefill, turn = _decode(), _prefill(), _turn()
    return FlashAttend() if decode is None or prefill is None or turn is None else NativeAttend(decode, prefill, turn)


class NativeAttend:
    """All sequences that decode in one call, all others in another."""

    def __init__(self, decode: ctypes.CDLL, prefill: ctypes.CDLL, turn: ctypes.CDLL) -> None:
        self._decode = decode
        self._prefill = prefill
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
        fits = head_dim <= MAX_HEAD_DIM and not head_dim % STEP
        if not fits or num_heads // keys_SGD.shape[1] > MAX_HEADS_PER_GROUP:
            return self._flash(query_TND, keys_SGD, values_SGD, spans, chunked)
        num_decodes = next((index for index, span in enumerate(spans) if span.count > 1), len(spans))
        if query_TND.stride()[1:] != (head_dim, 1):
            query_TND = query_TND.contiguous()
        mixed_TND = query_TND.new_empty(query_TND.shape)
        tensors = (query_TND, mixed_TND, keys_SGD, values_SGD)
        if num_decodes:
            self._fill_decodes(*tensors, spans[:num_decodes], chunked)
        if num_decodes < len(spans):
            self._fill_prefills(*tensors, spans[num_decodes:], chunked)
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
        self._decode.herd_decode(
            query_TND.data_ptr(),
            query_TND.stride(0),
            mixed_TND.data_ptr(),
            keys_SGD.data_ptr(),
            values_SGD.data_ptr(),
            *runs_of(spans, chunked),
            len(spans),
            query_TND.shape[1],
            *keys_SGD.shape[1:],
            torch.get_num_threads(),
        )

    def _fill_prefills(
        self,
        query_TND: torch.Tensor,
        mixed_TND: torch.Tensor,
        keys_SGD: torch.Tensor,
        values_SGD: torch.Tensor,
        spans: Sequence[Span],
        chunked: bool,
    ) -> None:
        """Write the rows of `spans` in `mixed_TND`."""
        numbers = NUMBER * len(spans)
        self._prefill.herd_prefill(
            query_TND.data_ptr(),
            query_TND.stride(0),
            mixed_TND.data_ptr(),
            keys_SGD.data_ptr(),
            values_SGD.data_ptr(),
            numbers(*(span.row for span in spans)),
            numbers(*(span.count for span in spans)),
            *runs_of(spans, chunked),
            len(spans),
            query_TND.shape[1],
            *keys_SGD.shape[1:],
            torch.get_num_threads(),
        )


Numbers = ctypes.Array[ctypes.c_long]


def runs_of(spans: Sequence[Span], chunked: bool) -> tuple[Numbers, Numbers, Numbers]:
    """As the kernels read them: starts and lengths of the runs of all spans, and the first run of each span."""
    runs = [span.runs(chunked) for span in spans]
    flat = [run for of_one in runs for run in of_one]
    array = NUMBER * len(flat)
    first = (NUMBER * (len(runs) + 1))(0, *accumulate(map(len, runs)))
    return array(*(run.start for run in flat)), array(*(len(run) for run in flat)), first


@cache
def _decode() -> ctypes.CDLL | None:
    """The compiled attention; None where the CPU or the compiler lacks something."""
    return prepared(load_decode)


def load_decode(flags: Sequence[str]) -> ctypes.CDLL | None:
    """`decode.c` compiled with `flags`; `herd_prepare` says whether this process may run it."""
    library = load(HERE / "decode.c", flags=flags)
    if library is not None:
        declare(library, "herd_decode", [POINTER, NUMBER, *[POINTER] * 6, NUMBER, NUMBER, NUMBER, NUMBER, THREADS])
    return library


@cache
def _prefill() -> ctypes.CDLL | None:
    return prepared(load_prefill)


def load_prefill(flags: Sequence[str]) -> ctypes.CDLL | None:
    """`prefill.c`, likewise."""
    library = load(HERE / "prefill.c", flags=flags)
    if library is not None:
        declare(library, "herd_prefill", [POINTER, NUMBER, *[POINTER] * 8, NUMBER, NUMBER, NUMBER, NUMBER, THREADS])
    return library


@cache
def _turn() -> ctypes.CDLL | None:
    library = load(HERE / "turn.c")
    if library is not None:
        arguments = [POINTER, POINTER, REAL, *[POINTER] * 4, NUMBER, NUMBER, NUMBER, NUMBER, THREADS]
        declare(library, "herd_turn", arguments)
    return library
