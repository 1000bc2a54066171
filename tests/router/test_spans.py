"""Where the keys of a packed batch's tokens are, against the same said one slot at a time."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.engine.packing import pack
from router.engine.request import Request, SamplingParams
from router.engine.scheduler import Piece
from router.model.spans import Runs, Span, clip_runs, close_up, num_slots

CPU = torch.device("cpu")


def slots(runs: Runs) -> list[int]:
    return [slot for run in runs for slot in run]


def request(num_known: int, global_blocks: list[int], local_blocks: list[int]) -> Request:
    return Request(
        request_id="a", token_ids=list(range(num_known)), num_prompt=num_known, sampling=SamplingParams(max_tokens=1),
        deadline=0.0, arrival=0.0, global_blocks=global_blocks, local_blocks=local_blocks,
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_every_token_is_where_its_block_table_says(data: st.DataObject) -> None:
    block_size, chunk = data.draw(st.integers(1, 7)), data.draw(st.none() | st.integers(1, 30))
    random = Random(data.draw(st.integers(0, 1 << 20)))
    orders = ([*range(100)], [*range(50, 100), *range(50)], random.sample(range(100), 100))
    pieces, at = [], 0
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, 50))
        count = data.draw(st.integers(1, 50 if chunk is None else chunk - start % chunk))
        has_global, has_local = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
        table, local = random.choice(orders), random.choice(orders)
        num_global = -(-(start + count) // block_size)
        one = request(start + count, table[:num_global] * has_global, local * has_local)
        pieces.append(Piece(request=one, start=start, count=count))
    batch = pack(pieces, block_size=block_size, chunk_size=chunk, device=CPU)
    expected_rows: dict[bool, list[int]] = {False: [], True: []}
    for piece, span in zip(pieces, batch.spans, strict=True):
        assert (span.row, span.count, span.position) == (at, piece.count, piece.start)
        at += piece.count
        first = 0 if chunk is None else piece.start // chunk * chunk
        end = piece.start + piece.count
        for chunked, begin, table in (
            (False, 0, piece.request.global_blocks),
            (True, first, piece.request.local_blocks),
        ):
            count = end - begin
            expected = [table[n // block_size] * block_size + n % block_size for n in range(count)] if table else None
            expected = list(range(count)) if expected is None else expected
            runs = span.runs(chunked)
            assert slots(runs) == expected and num_slots(runs) == count
            # As few runs as there can be.
            assert all(left.stop != right.start for left, right in pairwise(runs)) or not table
            assert slots(span.past(chunked)) == expected[: count - piece.count]
            assert slots(span.own(chunked)) == expected[count - piece.count :]
            expected_rows[chunked] += expected[count - piece.count :]
    assert batch.global_slots_T.tolist() == expected_rows[False]
    assert batch.local_slots_T.tolist() == expected_rows[True]
    assert batch.ids_T.tolist() == [token for p in pieces for token in range(p.start, p.start + p.count)]
    assert batch.positions_T.tolist() == batch.ids_T.tolist()


def test_a_piece_over_a_border_is_our_bug() -> None:
    piece = Piece(request=request(9, [0, 1, 2], [0, 1, 2]), start=3, count=2)
    with pytest.raises(AssertionError):
        pack([piece], block_size=4, chunk_size=4, device=CPU)


@given(st.lists(st.integers(1, 5), max_size=5), st.integers(0, 20))
def test_clipping(lengths: list[int], count: int) -> None:
    runs = tuple(range(100 * number, 100 * number + length) for number, length in enumerate(lengths))
    assert slots(clip_runs(runs, count)) == slots(runs)[:count]
    assert all(len(run) for run in clip_runs(runs, count))


def test_spans_close_up() -> None:
    spans = [
        Span(row=row, count=count, position=5, global_runs=(range(3),), local_runs=())
        for row, count in ((2, 3), (9, 1), (20, 4))
    ]
    assert [span.rows for span in close_up(spans)] == [slice(0, 3), slice(3, 4), slice(4, 8)]
