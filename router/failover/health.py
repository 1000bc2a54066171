"""What a router makes of one host: whether it answers, how soon it usually does, and so how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass, field

from experts.placement import ComputeCost
from router.failover.events import HostState
from router.failover.flight import Flight
from router.failover.recent import RecentRows
from router.failover.usual import Usual

TIMES_USUAL = 3.0
"""An answer that takes this many times as long as it usually does, at most, is overdue."""
MOST_OF_PEERS = 8.0
"""However slow a host usually is: its answers are judged as if it were at most this much slower than its peers."""
COLD_S = 0.3
"""Patience while nothing is usual yet, beside what the shipment costs."""
MISSES_TO_FENCE = 3
FENCE_S = 0.15
"""A host that is silent for this long and three patiences is fenced: as many misses in a row as make no odds."""
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.25, 30.0
LAST_SILENT_BACKOFF_S = 1.0
FORGET_S = 30.0
"""Trouble this long ago does not lengthen the next back-off."""
FIRST_SHARE, SHARE_STEP = 1 / 8, 1 / 16
PACE_WEIGHT = 1 / 16
RELAX_S = 1.0
SAMPLE_CLIP = 2.0
"""One late answer counts as at most twice the patience: what stopped for a minute is not slow for ever."""

RANK = {HostState.UP: 0, HostState.RETURNING: 0, HostState.SUSPECT: 1, HostState.FENCED: 2}
"""Rows go to the hosts of the lowest rank that serve them; hosts in other states get none."""


@dataclass(slots=True, kw_only=True, eq=False)
class Link:
    """The link to one life of one host. Times are in time of attention but for `probe_at` and `troubled_at`."""

    host: str
    incarnation: int
    cost: ComputeCost
    way_s: float
    """What a round trip takes besides computing, roughly: patience and pace are learnt as multiples."""
    state: HostState = HostState.DEAD
    flights: dict[int, Flight] = field(default_factory=dict)
    num_overdue: int = 0
    misses: int = 0
    """Overdue answers since the last one in time; those that were under way together count once."""
    missed_at: float = float("-inf")
    heard_at: float = float("-inf")
    ahead_s: float = 0.0
    """Work, by the cost model, of what is under way to it."""
    recent: RecentRows = field(default_factory=RecentRows)
    usual: Usual = field(default_factory=Usual)
    most_usual: float = float("inf")
    """What the peers' usual allows this one's to be."""
    pace: float = 1.0
    """How long answers take on average, as a multiple of the model's opinion."""
    paced_at: float = float("-inf")
    share: float = 1.0
    credit: float = 0.0
    fenced_at: float = float("-inf")
    backoff_s: float = FIRST_BACKOFF_S
    troubled_at: float = float("-inf")
    probe_at: float = float("inf")
    probes: int = 0
    """Since it was last in trouble."""

    @property
    def is_trusted(self) -> bool:
        return self.state in (HostState.UP, HostState.RETURNING)

    @property
    def is_used(self) -> bool:
        """Whether it is not even fenced."""
        return self.state in (HostState.UP, HostState.RETURNING, HostState.SUSPECT)

    @property
    def wants_probes(self) -> bool:
        return self.state in (HostState.FENCED, HostState.SILENT)

    def rank(self) -> int | None:
        return RANK.get(self.state)

    def rank_for_dispatch(self) -> int | None:
        """The same for a whole dispatch: of a host that returns, only so many are its own."""
        if self.state is not HostState.RETURNING:
            return RANK.get(self.state)
        self.credit += self.share
        if self.credit < 1.0:
            return RANK[HostState.FENCED]
        self.credit -= 1.0
        return RANK[HostState.RETURNING]

    def patience_s(self, expected_s: float, floor_s: float) -> float:
        """How long an answer may take that is expected after `expected_s`."""
        p99 = self.usual.p99
        if p99 is None:
            return COLD_S + TIMES_USUAL * expected_s
        return max(floor_s, TIMES_USUAL * min(p99, self.most_usual) * expected_s)

    def took_off(self, flight: Flight) -> None:
        self.flights[flight.number] = flight
        self.ahead_s += flight.cost_s
        if flight.parts:
            layer, _ = flight.parts[0].rows.key
            self.recent.add(layer, sum(part.num_rows for part in flight.parts), flight.sent_at)

    def landed(self, flight: Flight) -> None:
        """Answered, failed or given up."""
        del self.flights[flight.number]
        # No error of rounding outlives what is under way.
        self.ahead_s = self.ahead_s - flight.cost_s if self.flights else 0.0
        self.num_overdue -= flight.is_overdue and not flight.is_probe

    def pace_at(self, at: float, typical: float) -> float:
        """What was learnt, as far as it is not forgotten in favour of what is `typical`."""
        return typical + (self.pace - typical) * self._kept(at)

    def _kept(self, at: float) -> float:
        """Half of it after each `RELAX_S` without an answer, so that a host which was slow is tried again."""
        idle_s = at - self.paced_at
        return 1.0 if idle_s <= RELAX_S else 0.5 ** (idle_s / RELAX_S)

    def learn(self, flight: Flight, took_s: float, at: float, typical: float) -> bool:
        """Count the round trip of a shipment with rows, unless it tells of an outage. Whether the usual is new."""
        if flight.sent_at <= self.fenced_at:
            return False
        limit = SAMPLE_CLIP * (flight.overdue_at - flight.sent_at)
        sample = min(took_s, limit) / flight.expected_s
        # What little is known still weighs little beside news; the first sample stands for all.
        pace = self.pace_at(flight.sent_at, typical)
        self.pace = pace + max(PACE_WEIGHT, 1.0 - self._kept(flight.sent_at)) * (sample - pace)
        self.paced_at = at
        return self.usual.add(sample)

    def missed(self, flight: Flight, at: float) -> HostState:
        """The answer to `flight` is overdue, or is none. The state that follows."""
        if flight.sent_at >= self.missed_at:
            self.misses += 1
            self.missed_at = at
        if self.state is HostState.RETURNING or (self.is_used and self.misses >= MISSES_TO_FENCE):
            return HostState.FENCED
        return HostState.SUSPECT if self.state is HostState.UP else self.state

    def heard(self, flight: Flight, at: float, now: float) -> HostState:
        """An answer to `flight`, which has landed, came. The state that follows."""
        self.heard_at = at
        if self.wants_probes:
            return self._heard_when_fenced(flight, now)
        if flight.is_overdue:
            return self.excused()
        if not flight.is_probe:
            self.misses = 0
            if self.state is HostState.RETURNING:
                self.share += SHARE_STEP
        return HostState.UP if self.state is HostState.RETURNING and self.share >= 1.0 else self.state

    def excused(self) -> HostState:
        """Nothing of what was overdue is left. The state that follows."""
        return HostState.UP if self.state is HostState.SUSPECT and not self.num_overdue else self.state

    def _heard_when_fenced(self, flight: Flight, now: float) -> HostState:
        if flight.is_overdue or flight.sent_at < self.fenced_at:
            if self.state is HostState.SILENT:
                self.probe_at = now
            return HostState.FENCED
        self.misses = 0
        self.share, self.credit = FIRST_SHARE, 0.0
        return HostState.RETURNING

    def troubled(self, at: float, now: float) -> None:
        """It is fenced, silent or gone from now on: decide when to try it again."""
        recent = now - self.troubled_at < FORGET_S
        self.backoff_s = min(2 * self.backoff_s, LAST_BACKOFF_S) if recent else FIRST_BACKOFF_S
        self.fenced_at = at
        self.troubled_at = now
        self.probe_at = now + self.backoff_s
        self.probes = 0
        self.misses = 0

    def linked(self, now: float) -> HostState:
        """The link is up. One that was down in this life of the host must first answer a probe."""
        if self.troubled_at == float("-inf"):
            return HostState.UP
        first = self.backoff_s == FIRST_BACKOFF_S
        self.probe_at = now if first else self.troubled_at + self.backoff_s
        return HostState.FENCED

    def probed(self, now: float) -> None:
        """A probe is on its way: the next one, should nothing come of it, is later and later."""
        if self.probes:
            self.backoff_s = min(2 * self.backoff_s, LAST_BACKOFF_S)
        self.probes += 1
        # One that gets nothing else is asked often: whoever has no other replica waits for it.
        longest_s = LAST_SILENT_BACKOFF_S if self.state is HostState.SILENT else LAST_BACKOFF_S
        self.probe_at = now + min(self.backoff_s, longest_s)

    def is_hung(self, at: float) -> bool:
        """Whether it is time to fence it for one answer alone."""
        return self.is_used and any(self._fence_at(flight) <= at for flight in self.flights.values())

    def check_at(self) -> float:
        """When a verdict on what is under way is due."""
        due = float("inf")
        for flight in self.flights.values():
            due = min(due, self._fence_at(flight) if flight.is_overdue else flight.overdue_at)
        return due

    def _fence_at(self, flight: Flight) -> float:
        is_old = flight.is_probe or flight.sent_at <= self.fenced_at or not self.is_used
        return float("inf") if is_old or not flight.is_overdue else flight.fence_at
