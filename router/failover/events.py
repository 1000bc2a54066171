"""What happens to a router's shipments, and what is to be done about it. Plain values; the rules are in core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from experts.placement import ClusterView, ExpertKey


class Reason(StrEnum):
    """Why rows went to another host than was meant."""

    LOST = "lost"
    """The link ended: the host is dead or out of reach."""
    SLOW = "slow"
    """No answer for much longer than is usual: hedged."""
    FENCED = "fenced"
    """The same several times in a row."""
    DEADLINE = "deadline"
    NOT_HOSTED = "not_hosted"
    FAILED = "failed"
    BAD_FRAME = "bad_frame"


class HostState(StrEnum):
    """How far a router trusts a host, best first."""

    UP = "up"
    RETURNING = "returning"
    """Was fenced, answers again, and gets a growing share of what it would get."""
    SUSPECT = "suspect"
    """An answer is overdue: gets rows only where no better replica is."""
    FENCED = "fenced"
    """Several were: the same, and it is probed."""
    SILENT = "silent"
    """Has let a whole deadline pass: gets no rows before it says something."""
    DEAD = "dead"
    """Not linked: its link ended, or is not up yet."""


class RowsOf(NamedTuple):
    """Rows `start` … `stop` of those that a dispatch has for the expert `key`."""

    key: ExpertKey
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Viewed:
    """A new cluster view came. Its hosts count from now on, its placement from the next step on."""

    view: ClusterView


@dataclass(frozen=True, kw_only=True, slots=True)
class Linked:
    """These hosts have a live link now, and no others."""

    hosts: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBegun:
    """A step of the engine begins. Nobody waits for its tokens any more after `give_up_at`."""

    give_up_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Begin:
    """The rows of one layer are known: how many for each expert. `dispatch` names them from now on."""

    dispatch: int
    rows: Mapping[ExpertKey, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """The shell has looked for answers, which it meant to do until `until`; those it found follow as events.

    What was not there while nobody looked is nobody's fault.
    """

    until: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """The whole answer to `shipment` is here."""

    shipment: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """`shipment` gets no answer. `missing`: the experts that the host does not hold, should that be the reason."""

    shipment: int
    reason: Reason
    missing: frozenset[ExpertKey] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Revived:
    """These hosts said something after a deadline that they had let pass."""

    hosts: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """Everything that was there has been told: judge who is late."""


Event = Viewed | Linked | StepBegun | Begin | Looked | Answered | Failed | Revived | Tick


@dataclass(frozen=True, kw_only=True, slots=True)
class Send:
    """Ship `parts` of dispatch `dispatch` to `host`; the answer is wanted by `deadline`."""

    shipment: int
    dispatch: int
    host: str
    parts: tuple[RowsOf, ...]
    deadline: float
    is_first: bool = True
    """False for what is re-sent or hedged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Ask `host` for a sign of life: ship nothing."""

    shipment: int
    host: str
    deadline: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Take:
    """Of the answer to `shipment`, `parts` are wanted: no other answer brought them before."""

    shipment: int
    dispatch: int
    parts: tuple[RowsOf, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lose:
    """Nobody can compute `parts` of `dispatch` now: their rows leave the step."""

    dispatch: int
    parts: tuple[RowsOf, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entered:
    """The host is in another state from now on."""

    host: str
    state: HostState


Effect = Send | Probe | Take | Lose | Entered
