"""Plain counters of one router's dispatches, kept by `router.dispatch` and read by whoever shows them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field


class RoundTrips:
    """A histogram: `counts[i]` took up to `bounds_s[i]`, the last one longer than all bounds."""

    bounds_s = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

    def __init__(self) -> None:
        self.counts = [0] * (len(self.bounds_s) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds_s, seconds)] += 1
        self.total_s += seconds


@dataclass
class DispatchStats:
    """Counters since start and what is now; times in seconds.

    `hedges` by outcome, `failovers` by reason, `failures` by error. `hosts`: the state of each host now, as this router
    sees it; `entered_at`: when, by the clock on the wall, a host last entered a state. `round_trips` by layer: from
    dispatch to the last answer. `decision_s` went into `decisions` calls of the failover machine.
    """

    shipments: int = 0
    resends: int = 0
    probes: int = 0
    rows_sent: int = 0
    rows_lost: int = 0
    dispatches: int = 0
    wait_s: float = 0.0
    decisions: int = 0
    decision_s: float = 0.0
    epoch: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    hedges: Counter[str] = field(default_factory=Counter)
    failovers: Counter[str] = field(default_factory=Counter)
    hosts: dict[str, str] = field(default_factory=dict)
    entered_at: dict[tuple[str, str], float] = field(default_factory=dict)
    round_trips: dict[int, RoundTrips] = field(default_factory=dict)
