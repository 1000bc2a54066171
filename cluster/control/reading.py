"""Where the control loop gets its load from: one method, and what it says when there is none to be had. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cluster.control.fleet import Load
from cluster.control.state import ControllerState
from experts.placement import ExpertKey
from experts.reports import MemberKind

WINDOW_S = 12.0
"""Long enough that what few requests do by chance is evened out. Less counts where the load has shifted."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """No load that could be acted upon, and in plain words why. It is not a load of zero."""

    reason: str

    def __post_init__(self) -> None:
        # It may repeat what somebody else said, and is shown on terminals.
        shown = "".join(character if character.isprintable() else " " for character in self.reason)
        object.__setattr__(self, "reason", shown)


@dataclass(frozen=True, kw_only=True)
class Page:
    """A process whose numbers a load needs: its name, and the address ("ip:port") of its metrics page."""

    name: str
    address: str


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What has to be seen before a load is one: every expert there is, and the processes that live now.

    Of processes that are not named here what was counted still counts, but nobody waits for them.
    """

    keys: frozenset[ExpertKey] = frozenset()
    hosts: tuple[Page, ...] = ()
    routers: tuple[Page, ...] = ()


class LoadSource(Protocol):
    """Measures. Asked about once a second, on a thread that serves nobody: it may block, for some seconds at most."""

    def load(self, expected: Expected, now: float) -> Load | Held:
        """The load until about `now`, an instant of the caller's clock; `Load.at` is of that clock, too.

        Never raises for what a network or another program does: that is `Held`.
        """
        ...


def expected_of(state: ControllerState) -> Expected:
    """The experts of the target, the hosts that hold some of them and are not lost, and the routers.

    Of a host that holds nothing there is nothing to be read, and a new one must not make a plan wait until somebody
    found its page.
    """
    reports = [host.report for host in state.hosts.values() if host.report is not None and not host.lost]
    hosts = [report for report in reports if report.held]
    routers = [member.report for member in state.members.values() if member.report.kind is MemberKind.ROUTER]
    return Expected(
        keys=frozenset(state.journal.target),
        hosts=tuple(Page(name=report.name, address=report.metrics_address) for report in hosts),
        routers=tuple(Page(name=report.name, address=report.metrics_address) for report in routers),
    )
