"""Runs decode steps in fixed shapes: chooses a step's shape, fills its inputs, drives its segments. Knows no CUDA.

Shape letters: B rows of a shape, T rows of them that are sequences, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from experts.placement import ExpertKey
from router.engine.kv_layout import KVLayout
from router.engine.packing import images_of
from router.engine.scheduler import Piece
from router.model.decoder import Decoder, Pending, RoutedExperts, StepOutput
from router.model.kv_store import KVStore
from router.model.static_decode import ExpertsAtHand, Leaving, Segment, StaticStep
from router.model.static_inputs import DecodeInputs, DecodeShape
from router.routed import Routing, to_host

MAX_BATCH = 256
LEAST_BLOCKS = 8
MAX_GATHERED = 1 << 18
"""Rows times visible slots of a layer: what is gathered costs memory, 1 GiB of it here for Scout in bfloat16."""
MAX_PROGRAMS = 32

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
Lost = dict[int, frozenset[ExpertKey]]


class Recorder(Protocol):
    """Makes work repeatable: what it returns does the same again, on the same tensors, and returns the same objects."""

    def __call__(self, works: Sequence[Callable[[], _Result]]) -> list[Callable[[], _Result]]:
        """`works` depend on each other in their order. May run them, any number of times."""
        ...


def unrecorded(works: Sequence[Callable[[], _Result]]) -> list[Callable[[], _Result]]:
    """Every work is its own repetition."""
    return list(works)


class Program(Protocol):
    """A shape made ready."""

    inputs: DecodeInputs

    def run(self, num_rows: int) -> tuple[torch.Tensor, Lost]:
        """Logits of at least the first `num_rows` rows, and the experts that rows have lost. The logits are good until
        the next run of any program."""
        ...


class StaticSteps:
    """Programs by shape; the least recently used ones leave. With `at_hand` a step is one piece of work, without it
    rows travel by way of the decoder's experts."""

    def __init__(
        self,
        decoder: Decoder,
        store: KVStore,
        layout: KVLayout,
        *,
        at_hand: ExpertsAtHand | None = None,
        record: Recorder = unrecorded,
        max_programs: int = MAX_PROGRAMS,
    ) -> None:
        self._decoder = decoder
        self._store = store
        self._layout = layout
        self._at_hand = at_hand
        self._record = record
        self._max_programs = max_programs
        self._programs: OrderedDict[DecodeShape, Program | None] = OrderedDict()

    def run(self, pieces: Sequence[Piece]) -> StepOutput | None:
        """Compute the pieces; None where they do not fit any shape and nothing was done."""
        shape = shape_of(pieces, self._layout)
        if shape is None:
            return None
        program = self._program(shape)
        if program is None:
            return None
        program.inputs.flat.copy_(fill(shape, pieces, self._layout).flat)
        logits_BV, lost = program.run(len(pieces))
        samples = tuple(row for row, piece in enumerate(pieces) if piece.samples and row not in lost)
        is_whole = len(samples) == len(pieces)
        logits_SV = logits_BV[: len(pieces)] if is_whole else logits_BV[list(samples)]
        return StepOutput(logits_SV=logits_SV, samples=samples, lost=lost)

    def _program(self, shape: DecodeShape) -> Program | None:
        """None where there was no making it, for lack of memory, say; it is tried once while it is remembered."""
        if shape in self._programs:
            self._programs.move_to_end(shape)
            return self._programs[shape]
        # Before the new one takes its memory.
        while len(self._programs) >= self._max_programs:
            self._programs.popitem(last=False)
        try:
            self._programs[shape] = self._make(shape)
        except RuntimeError as error:
            log.warning("decode steps of %s run without a fixed shape: %s", shape, error)
            self._programs[shape] = None
        return self._programs[shape]

    def _make(self, shape: DecodeShape) -> Program:
        decoder = self._decoder
        inputs = DecodeInputs(shape, decoder.weights.device)
        step = StaticStep(decoder.config, decoder.weights, self._store, inputs, block_size=self._layout.block_size)
        if self._at_hand is not None:
            return WholeProgram(step, self._at_hand, self._record)
        return CutProgram(step, decoder.experts, self._record)


class WholeProgram:
    """A step without a cut: the experts are at hand."""

    def __init__(self, step: StaticStep, experts: ExpertsAtHand, record: Recorder) -> None:
        self.inputs = step.inputs
        # Kept: records read its tensors.
        self._step = step
        [self._compute] = record([lambda: step.whole(experts)])

    def run(self, num_rows: int) -> tuple[torch.Tensor, Lost]:
        return self._compute(), {}


class CutProgram:
    """A step that pauses wherever rows leave. Rows that have lost an expert go on alone, to no avail and unseen by the
    others, but are not sent any more."""

    def __init__(self, step: StaticStep, experts: RoutedExperts, record: Recorder) -> None:
        self.inputs = step.inputs
        self._step = step
        self._experts = experts
        self._segments: list[Segment] = record(list(step.segments()))

    def run(self, num_rows: int) -> tuple[torch.Tensor, Lost]:
        lost: Lost = {}
        pending: Pending | None = None
        for segment in self._segments:
            result = segment()
            rows = [row for row in range(num_rows) if row not in lost]
            if isinstance(result, Leaving):
                pending = self._send(result, rows, num_rows) if rows else None
            elif result is None and pending is not None:
                lost |= self._receive(pending, rows, num_rows)
        assert isinstance(result, torch.Tensor), "the last segment ends with the logits"
        return result, lost

    def _send(self, leaving: Leaving, rows: list[int], num_rows: int) -> Pending:
        wanted = slice(num_rows) if len(rows) == num_rows else rows
        routing = Routing(expert_TK=leaving.routing.expert_TK[:num_rows], score_TK=leaving.routing.score_TK[:num_rows])
        x_TH, routing = to_host(leaving.x_BH[:num_rows], routing)
        chosen = Routing(expert_TK=routing.expert_TK[wanted], score_TK=routing.score_TK[wanted])
        return self._experts.dispatch(leaving.layer, x_TH[wanted], chosen)

    def _receive(self, pending: Pending, rows: list[int], num_rows: int) -> Lost:
        combined = pending.combine()
        y_TH = combined.y_TH
        if len(rows) < num_rows:
            y_TH = y_TH.new_zeros((num_rows, y_TH.shape[1])).index_copy_(0, torch.tensor(rows), y_TH)
        self._step.y_BH[:num_rows].copy_(y_TH)
        return {rows[index]: frozenset(keys) for index, keys in combined.lost.items()}


def shape_of(pieces: Sequence[Piece], layout: KVLayout) -> DecodeShape | None:
    """The shape of a step of single tokens, none of them part of an image; None of any other step or a larger one."""
    if len(pieces) > MAX_BATCH or any(piece.count != 1 for piece in pieces) or images_of(pieces):
        return None
    batch = _power_of_two(len(pieces))
    counts = [[len(_blocks(piece, layout, chunked)) for piece in pieces] for chunked in (False, True)]
    num_global, num_local = (_num_blocks(max(of_kind)) for of_kind in counts)
    if batch * max(num_global, num_local) * layout.block_size > MAX_GATHERED:
        return None
    return DecodeShape(batch=batch, num_blocks=(num_global, num_local))


def fill(shape: DecodeShape, pieces: Sequence[Piece], layout: KVLayout) -> DecodeInputs:
    """The inputs of `pieces`, in the host's memory."""
    inputs = DecodeInputs(shape, torch.device("cpu"))
    ids, positions, live = inputs.ids_B.numpy(), inputs.positions_B.numpy(), inputs.live_B.numpy()
    ids[: len(pieces)] = [piece.request.token_ids[piece.start] for piece in pieces]
    positions[: len(pieces)] = [piece.start for piece in pieces]
    live[: len(pieces)] = 1
    for chunked, table_BM in enumerate(inputs.tables_BM):
        table = table_BM.numpy()
        for row, piece in enumerate(pieces):
            blocks = _blocks(piece, layout, bool(chunked))
            table[row, : len(blocks)] = blocks
    return inputs


def _blocks(piece: Piece, layout: KVLayout, chunked: bool) -> list[int]:
    """The part of a piece's block table that it sees; empty where no layer is of that kind."""
    first = piece.start // layout.border * layout.border if chunked and layout.border else 0
    blocks = piece.request.local_blocks if chunked else piece.request.global_blocks
    return blocks[: (piece.start - first) // layout.block_size + 1]


def _num_blocks(count: int) -> int:
    return max(_power_of_two(count), LEAST_BLOCKS) if count else 0


def _power_of_two(count: int) -> int:
    """The least one from `count` on."""
    return 1 << (count - 1).bit_length()
