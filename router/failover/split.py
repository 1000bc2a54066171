"""Divides the rows of one dispatch among the hosts that serve them so that the slowest host finishes early.

A host takes some time to begin, a read of weights for each expert that it touches, and some time for each row. So few
rows of an expert stay together, many are cut where that lets the last host finish sooner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experts.placement import ExpertKey

WORTH = 0.97
"""An expert is moved when that takes the finish of the slowest host below this share."""
WORTH_TWO = 0.9
"""The same for two of them at once."""
WORTH_A_READ = 0.85
"""The same for some rows of one, whose weights are then read twice: other routers want those hosts, too."""


@dataclass(slots=True, eq=False)
class Lane:
    """One host's finish, in seconds from now: `begin_s` with nothing to do, more with every expert and row."""

    host: str
    begin_s: float
    per_expert_s: float
    per_row_s: float
    recent: float = 0.0
    """Rows of this layer that the host was given lately. Among equals the one with fewer is taken."""
    finish_s: float = 0.0


Want = tuple[bool, int, ExpertKey, Sequence[Lane]]
"""(whether there is a choice, minus the number of rows, expert, who may have it): sorted, they are in order of placing.
Those without a choice first: the others go around them. Then the most rows first."""


class _Piece:
    """`rows` rows of an expert on a lane."""

    __slots__ = ("key", "lane", "lanes", "rows")

    def __init__(self, key: ExpertKey, rows: int, lane: Lane, lanes: Sequence[Lane]) -> None:
        self.key = key
        self.rows = rows
        self.lane = lane
        self.lanes = lanes


def split(wants: list[Want]) -> dict[str, list[tuple[ExpertKey, int, int]]]:
    """Host → (expert, first row, row after the last).

    Greedy: the most rows first, each expert where it is done soonest; then, while it pays, the slowest host gives
    an expert, or some of its rows, to another. `wants` is sorted.
    """
    wants.sort()
    pieces = [_Piece(key, -minus_rows, _soonest(lanes, -minus_rows), lanes) for _, minus_rows, key, lanes in wants]
    if wants and wants[-1][0]:
        _even_out(pieces)
    return _by_host(pieces)


def _soonest(lanes: Sequence[Lane], rows: int) -> Lane:
    """Put so many rows of an expert on the lane that is done with them first, or on one of its equals."""
    if len(lanes) == 1:
        best = lanes[0]
        best.finish_s = _done(best, rows)
        return best
    done = [_done(lane, rows) for lane in lanes]
    limit = min(done) / WORTH
    chosen = min([place for place, done_s in enumerate(done) if done_s <= limit], key=lambda place: lanes[place].recent)
    lanes[chosen].finish_s = done[chosen]
    return lanes[chosen]


def _done(lane: Lane, rows: int) -> float:
    return (lane.finish_s or lane.begin_s) + lane.per_expert_s + lane.per_row_s * rows


def _even_out(pieces: list[_Piece]) -> None:
    lanes = {lane.host: lane for piece in pieces for lane in piece.lanes}
    for _ in range(2 * len(lanes) + 2):
        slowest = max(lanes.values(), key=lambda lane: lane.finish_s)
        goal = WORTH * slowest.finish_s
        if all((lane.finish_s or lane.begin_s) + lane.per_expert_s >= goal for lane in lanes.values()):
            return
        if not _relieve_by_two(slowest, pieces) and not _relieve(slowest, goal, pieces):
            return


def _relieve(slowest: Lane, goal: float, pieces: list[_Piece]) -> bool:
    """Make the best of all moves from `slowest` to one other lane; whether one gets below `goal`."""
    best: tuple[_Piece, Lane, int] | None = None
    least = float("inf")
    taken = {(piece.key, piece.lane.host) for piece in pieces}
    for piece in pieces:
        if piece.lane is not slowest:
            continue
        for lane in piece.lanes:
            start = (lane.finish_s or lane.begin_s) + lane.per_expert_s
            if start >= goal or (piece.key, lane.host) in taken:
                continue
            for moved in (piece.rows, _even_share(slowest, lane, start, piece.rows)):
                left = slowest.finish_s - slowest.per_row_s * moved
                if moved == piece.rows:
                    left -= slowest.per_expert_s
                done = max(left, start + lane.per_row_s * moved)
                enough = goal if moved == piece.rows else WORTH_A_READ * slowest.finish_s
                if moved > 0 and done < min(enough, least):
                    best, least = (piece, lane, moved), done
    if best is None:
        return False
    _move(*best, pieces)
    return True


def _relieve_by_two(slowest: Lane, pieces: list[_Piece]) -> bool:
    """Move an expert from `slowest` to a lane that gives one of its own away, maybe to `slowest`; whether that pays."""
    goal = WORTH_TWO * slowest.finish_s
    taken = {(piece.key, piece.lane.host) for piece in pieces}
    for piece in pieces:
        if piece.lane is not slowest:
            continue
        for lane in piece.lanes:
            if lane is slowest or (piece.key, lane.host) in taken:
                continue
            room = goal - lane.finish_s - _work(lane, piece)
            for other in pieces:
                if other.lane is not lane or room + _work(lane, other) < 0.0:
                    continue
                for third in other.lanes:
                    if third is lane or (other.key, third.host) in taken:
                        continue
                    freed = _work(slowest, piece) if third is slowest else 0.0
                    if _done(third, other.rows) - freed <= goal:
                        _move(other, third, other.rows, pieces)
                        _move(piece, lane, piece.rows, pieces)
                        return True
    return False


def _work(lane: Lane, piece: _Piece) -> float:
    return lane.per_expert_s + lane.per_row_s * piece.rows


def _even_share(slowest: Lane, lane: Lane, start: float, rows: int) -> int:
    """How many rows to move so that both finish at about the same time."""
    per_row_s = slowest.per_row_s + lane.per_row_s
    if not per_row_s:
        return 0
    return min(rows, int((slowest.finish_s - start) / per_row_s + 0.5))


def _move(piece: _Piece, lane: Lane, moved: int, pieces: list[_Piece]) -> None:
    source = piece.lane
    lane.finish_s = (lane.finish_s or lane.begin_s) + lane.per_expert_s + lane.per_row_s * moved
    source.finish_s -= source.per_row_s * moved
    if moved == piece.rows:
        source.finish_s -= source.per_expert_s
        piece.lane = lane
        return
    piece.rows -= moved
    pieces.append(_Piece(piece.key, moved, lane, piece.lanes))


def _by_host(pieces: list[_Piece]) -> dict[str, list[tuple[ExpertKey, int, int]]]:
    """Rows of an expert in order: the first host that has some gets the first."""
    by_host: dict[str, list[tuple[ExpertKey, int, int]]] = {}
    begun: dict[ExpertKey, int] = {}
    for piece in pieces:
        start = begun.get(piece.key, 0)
        begun[piece.key] = stop = start + piece.rows
        by_host.setdefault(piece.lane.host, []).append((piece.key, start, stop))
    return by_host
