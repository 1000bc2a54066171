"""What a runner would have put into each slot of the key/value store, and whether a step reads what it must.

The content of a slot is everything that the keys and values of a position follow from: salts, tokens and images up to
there. Each such history gets a number, so that comparing is cheap.
"""

from __future__ import annotations

from router.engine.kv_layout import KVLayout
from router.engine.request import Request
from router.engine.scheduler import Piece

RUBBISH = -1
"""What a lost piece leaves behind: some layers were written, others not."""

Slot = tuple[str, int, int]


class KVContents:
    """The store of one router, all rubbish at first."""

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._slots: dict[Slot, int] = {}
        self._numbers: dict[object, int] = {}
        self._histories: dict[Request, list[int]] = {}

    def write(self, piece: Piece, *, lost: bool) -> None:
        """The piece has run."""
        for position in range(piece.start, piece.start + piece.count):
            for slot in self._slots_of(piece.request, position, local=position):
                self._slots[slot] = RUBBISH if lost else self._history(piece.request, position)

    def check(self, piece: Piece) -> None:
        """Everything that the piece attends to and does not write itself is there."""
        for position in range(piece.start):
            expected = self._history(piece.request, position)
            for slot in self._slots_of(piece.request, position, local=piece.start):
                found = self._slots.get(slot, RUBBISH)
                assert found == expected, f"{piece.request.request_id} reads {slot} for position {position}"

    def _slots_of(self, request: Request, position: int, local: int) -> list[Slot]:
        """Where the position's keys are, of those layers that see it from the chunk of position `local`."""
        slots, size = [], self._layout.block_size
        if self._layout.has_global:
            slots.append(("global", request.global_blocks[position // size], position % size))
        start = local // self._layout.chunk_size * self._layout.chunk_size if self._layout.chunk_size else 0
        if self._layout.has_local and position >= start:
            slots.append(("local", request.local_blocks[(position - start) // size], (position - start) % size))
        return slots

    def _history(self, request: Request, position: int) -> int:
        numbers = self._histories.setdefault(request, [])
        while len(numbers) <= position:
            at = len(numbers)
            before: object = numbers[-1] if numbers else (request.cache_salt, request.adapter_salt)
            rows = [
                (placed.image.digest, placed.positions.index(at)) for placed in request.images if at in placed.positions
            ]
            now = (before, request.token_ids[at], tuple(rows))
            numbers.append(self._numbers.setdefault(now, len(self._numbers)))
        return numbers[position]
