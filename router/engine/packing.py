"""Turns a step's pieces into the tensors of a packed batch: token ids, positions and key/value slots.

Slot s of a pool is token s mod block_size of block s ÷ block_size. Global tables count from position 0, local ones from
the start of the request's current attention chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from router.engine.scheduler import Piece
from router.model.attention import Span
from router.model.decoder import PackedBatch


def pack(pieces: Sequence[Piece], *, block_size: int, chunk_size: int | None, device: torch.device) -> PackedBatch:
    """Lay the pieces end to end. A piece never crosses a chunk border (the scheduler's rule, asserted here)."""
    spans, row = [], 0
    for piece in pieces:
        spans.append(_span(piece, row, block_size, chunk_size, device))
        row += piece.count
    ids = [token for piece in pieces for token in piece.request.token_ids[piece.start : piece.start + piece.count]]
    positions = [torch.arange(piece.start, piece.start + piece.count, device=device) for piece in pieces]
    return PackedBatch(
        ids_T=torch.tensor(ids, dtype=torch.int64, device=device),
        positions_T=torch.cat(positions),
        global_slots_T=torch.cat([span.global_slots[-span.count :] for span in spans]),
        local_slots_T=torch.cat([span.local_slots[-span.count :] for span in spans]),
        spans=tuple(spans),
        samples=tuple(index for index, piece in enumerate(pieces) if piece.samples),
    )


def _span(piece: Piece, row: int, block_size: int, chunk_size: int | None, device: torch.device) -> Span:
    end = piece.start + piece.count
    chunk_start = 0 if chunk_size is None else piece.start // chunk_size * chunk_size
    assert chunk_size is None or end <= chunk_start + chunk_size, (piece.start, piece.count, chunk_size)
    return Span(
        row=row,
        count=piece.count,
        position=piece.start,
        global_slots=_slots(piece.request.global_blocks, end, block_size, device),
        local_slots=_slots(piece.request.local_blocks, end - chunk_start, block_size, device),
    )


def _slots(blocks: list[int], count: int, block_size: int, device: torch.device) -> torch.Tensor:
    """The first `count` slots of a block table; zeros where the model has no layer of that kind and so no blocks."""
    if not blocks:
        return torch.zeros(count, dtype=torch.int64, device=device)
    first = torch.tensor(blocks[: -(-count // block_size)], dtype=torch.int64, device=device) * block_size
    slots = first[:, None] + torch.arange(block_size, device=device)
    return slots.flatten()[:count]
