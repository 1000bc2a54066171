"""A dispatch, the parts that its rows were cut into, and the shipments that carry them. State; core has the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from experts.placement import Placement
from router.failover.events import RowsOf


@dataclass(slots=True, kw_only=True, eq=False)
class Dispatch:
    """The rows of one layer. `num_open`: parts neither answered nor lost. Nothing is sent after `give_up_at`."""

    number: int
    placement: Placement
    deadline: float
    give_up_at: float
    num_open: int = 0


@dataclass(slots=True, eq=False)
class Part:
    """Rows that travel together. `settled`: answered or lost. `tried`: lives of hosts that were asked for them."""

    rows: RowsOf
    dispatch: Dispatch
    settled: bool = False
    sends: int = 0
    tried: list[tuple[str, int]] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    """Shipments with them that may still be answered."""

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(slots=True, kw_only=True, eq=False)
class Flight:
    """One shipment under way to one life of a host; a probe has no parts.

    `sent_at`, `overdue_at` and `fence_at` are in time of attention, `sent_clock` and `deadline` on the clock.
    `cost_s` is what the host works on it by the cost model, `expected_s` with what is ahead of it and the way.
    """

    number: int
    host: str
    parts: Sequence[Part]
    sent_at: float
    sent_clock: float
    deadline: float
    cost_s: float
    expected_s: float
    overdue_at: float
    fence_at: float
    pauses: int
    is_hedge: bool = False
    is_overdue: bool = False

    @property
    def is_probe(self) -> bool:
        return not self.parts
