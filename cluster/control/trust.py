"""Whether a measured load can be acted upon. What is missing, old or absurd holds the last plan; it never moves one."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cluster.control.fleet import Fleet, Load
from experts.placement import ExpertKey

MOST_ROWS = 1e9
"""No expert of any cluster receives so many rows per second."""
CLOCK_SLACK_S = 5.0


def doubt_load(load: Load | None, keys: Iterable[ExpertKey], now: float, max_age_s: float) -> str:
    """Why `load` says nothing about where experts should be; empty when it does. `keys` are all experts there are."""
    if load is None:
        return "no load was measured"
    if not (math.isfinite(load.at) and math.isfinite(load.window_s) and load.window_s > 0.0):
        return "the load has no time"
    if now - load.at > max_age_s:
        return f"the load is {now - load.at:.0f} s old"
    if load.at - now > CLOCK_SLACK_S:
        return f"the load is from {load.at - now:.0f} s ahead"
    if not 0.0 <= load.dispatches <= MOST_ROWS:
        return f"{load.dispatches} dispatches per second cannot be"
    return _doubt_rows(load, frozenset(keys))


def _doubt_rows(load: Load, keys: frozenset[ExpertKey]) -> str:
    if load.rows.keys() != keys:
        missing, strange = keys - load.rows.keys(), load.rows.keys() - keys
        found = f"of {len(missing)} experts" if missing else f"of experts that are not here, such as {min(strange)}"
        return f"{'no rows were read' if missing else 'rows were read'} {found}"
    # One comparison for all: NaN compares false.
    if not all(0.0 <= amount <= MOST_ROWS for amount in load.rows.values()):
        key, amount = next(item for item in load.rows.items() if not 0.0 <= item[1] <= MOST_ROWS)
        return f"{amount} rows per second of expert {key[1]} in layer {key[0]} cannot be"
    return ""


def doubt_use(load: Load, fleet: Fleet) -> str:
    """Why `load` says nothing about the number of hosts; empty when it does."""
    for name in fleet.staying:
        busy = load.busy.get(name)
        if busy is None:
            return f"nobody knows how busy host {name} is"
        if not 0.0 <= busy <= 1.5:
            return f"host {name} cannot be busy for {busy} of the time"
    if load.queue_s is None:
        return "nobody knows how long requests wait"
    if not 0.0 <= load.queue_s < math.inf:
        return f"requests cannot wait for {load.queue_s} s"
    return ""
