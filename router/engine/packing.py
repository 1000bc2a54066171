"""Turns a step's pieces into the tensors of a packed batch: token ids, positions, key/value slots and image features.

Slot s of a pool is token s mod block_size of block s ÷ block_size. Global tables count from position 0, local ones from
the start of the request's current attention chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from router.engine.images import ImageInput
from router.engine.scheduler import Piece
from router.model.decoder import PackedBatch
from router.model.spans import Runs, Span

WORTH_AN_ARRAY = 64
"""Blocks of a table; a shorter one is gone through sooner than it is copied."""
NO_FEATURES: Mapping[bytes, torch.Tensor] = {}


def pack(
    pieces: Sequence[Piece],
    *,
    block_size: int,
    chunk_size: int | None,
    device: torch.device,
    features: Mapping[bytes, torch.Tensor] = NO_FEATURES,
) -> PackedBatch:
    """Lay the pieces end to end. A piece never crosses a chunk border (the scheduler's rule, asserted here).

    `features` holds those of `images_of(pieces)` by digest, in the order of their patch tokens.
    """
    spans, row = [], 0
    for piece in pieces:
        spans.append(_span(piece, row, block_size, chunk_size))
        row += piece.count
    ids = [token for piece in pieces for token in piece.request.token_ids[piece.start : piece.start + piece.count]]
    positions = [position for piece in pieces for position in range(piece.start, piece.start + piece.count)]
    image_rows, image_features = _image_rows(pieces, features)
    return PackedBatch(
        ids_T=torch.tensor(ids, dtype=torch.int64, device=device),
        positions_T=torch.tensor(positions, dtype=torch.int64, device=device),
        global_slots_T=torch.tensor(_own_slots(spans, False), dtype=torch.int64, device=device),
        local_slots_T=torch.tensor(_own_slots(spans, True), dtype=torch.int64, device=device),
        spans=tuple(spans),
        samples=tuple(index for index, piece in enumerate(pieces) if piece.samples),
        image_rows_P=torch.tensor(image_rows, dtype=torch.int64, device=device) if image_rows else None,
        image_features_PH=torch.cat(image_features) if image_rows else None,
    )


def images_of(pieces: Sequence[Piece]) -> list[ImageInput]:
    """The images that some of the pieces' tokens are patches of."""
    return [
        placed.image
        for piece in pieces
        for placed in piece.request.images
        if placed.rows_within(piece.start, piece.count)
    ]


def _image_rows(
    pieces: Sequence[Piece], features: Mapping[bytes, torch.Tensor]
) -> tuple[list[int], list[torch.Tensor]]:
    """Rows of the batch that are patches, and their features part by part; a piece may hold any part of an image."""
    rows: list[int] = []
    parts: list[torch.Tensor] = []
    first_row = 0
    for piece in pieces:
        for placed in piece.request.images:
            wanted = placed.rows_within(piece.start, piece.count)
            if wanted:
                rows += [first_row + placed.positions[row] - piece.start for row in wanted]
                parts.append(features[placed.image.digest][wanted.start : wanted.stop])
        first_row += piece.count
    return rows, parts


def _span(piece: Piece, row: int, block_size: int, chunk_size: int | None) -> Span:
    end = piece.start + piece.count
    chunk_start = 0 if chunk_size is None else piece.start // chunk_size * chunk_size
    assert chunk_size is None or end <= chunk_start + chunk_size, (piece.start, piece.count, chunk_size)
    return Span(
        row=row,
        count=piece.count,
        position=piece.start,
        global_runs=_runs(piece.request.global_blocks, end, block_size),
        local_runs=_runs(piece.request.local_blocks, end - chunk_start, block_size),
    )


def _runs(blocks: list[int], count: int, block_size: int) -> Runs:
    """The first `count` slots of a block table; nowhere (slot 0) where the model has no layer of that kind and so no
    blocks."""
    if not blocks:
        return (range(count),)
    table = blocks[: -(-count // block_size)]
    runs, begin = [], 0
    for end in (*_breaks(table), len(table)):
        first = table[begin] * block_size
        runs.append(range(first, first + min(end * block_size, count) - begin * block_size))
        begin = end
    return tuple(runs)


def _breaks(table: list[int]) -> list[int]:
    """Where a block does not follow the one before."""
    if len(table) < WORTH_AN_ARRAY:
        return [index for index in range(1, len(table)) if table[index] != table[index - 1] + 1]
    breaks: list[int] = (np.flatnonzero(np.diff(np.array(table)) != 1) + 1).tolist()
    return breaks


def _own_slots(spans: Sequence[Span], chunked: bool) -> list[int]:
    """Where each token of the batch keeps its keys and values."""
    return [slot for span in spans for run in span.own(chunked) for slot in run]
