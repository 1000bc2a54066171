"""Which hosts are sick: they are there, but routers cannot use them. Judged from what routers say, over some time.

Whoever says nothing changes nothing: a host is well again only when it is said to be, or has begun a new life.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

SICK_AFTER_S = 3.0
RELAPSE_S = 30.0
"""One that is being tried again and is not in use yet counts as sick no longer than this."""

UNUSABLE = ("fenced", "silent", "dead")
WELL = "up"


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """`since` when some router cannot use a host, and when that was last said; None while nobody says so."""

    since: float | None = None
    last: float | None = None

    def hear(self, states: Iterable[str], now: float) -> Trouble:
        """Take in the states in which all routers see the host."""
        states = list(states)
        if any(state in UNUSABLE for state in states):
            if self.since is None or self.last is None or now - self.last > RELAPSE_S:
                return Trouble(since=now, last=now)
            return replace(self, last=now)
        return Trouble() if states and all(state == WELL for state in states) else self

    def is_sick(self, now: float) -> bool:
        """Whether it has lasted long enough to be believed, and is not long ago."""
        if self.since is None or self.last is None:
            return False
        return self.last - self.since >= SICK_AFTER_S and now - self.last < RELAPSE_S
