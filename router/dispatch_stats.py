"""Plain counters of one router's dispatches, kept by `router.dispatch` and read by whoever shows them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from router.histogram import Histogram


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
    round_trips: dict[int, Histogram] = field(default_factory=dict)
