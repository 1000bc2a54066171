"""The transport of the simulated network; see `experts.transport.base.Transport`. Time is the world's.

What the wire does for the real transport is modelled, not left out: answers carry the number of what they answer and
the incarnation of the host that was asked, and rows whose checksum is wrong are a `BadFrame`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from cluster.simulate.network import Corrupt, End, Network
from cluster.simulate.process import Process
from experts.errors import BadFrame, DeadlinePassed, HostLost, TransportError
from experts.placement import HostInfo
from experts.transport.base import Shipment, Ticket

FIRST_PAUSE_S, LAST_PAUSE_S, REFUSED_PAUSE_S = 0.05, 1.0, 1.0
HELLO_S = 3.0
MAX_IN_FLIGHT = 64

Outcome = torch.Tensor | TransportError


@dataclass(frozen=True, kw_only=True)
class Hello:
    """A host's first message."""

    host: str
    incarnation: int


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A shipment on its way; `left_s` until its deadline."""

    seq: int
    shipment: Shipment
    left_s: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of shipment `seq`."""

    seq: int
    outcome: Outcome
    incarnation: int


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What the receiving end checks. All of it; tests switch one off to see that it is missed."""

    checksum: bool = True
    seq: bool = True


class VirtualTransport:
    """Links over a simulated network. `rough`: see `cluster.simulate.network`. `on_send` hears of every shipment."""

    def __init__(
        self,
        network: Network,
        process: Process,
        *,
        rough: bool = False,
        on_change: Callable[[], None] = lambda: None,
        on_send: Callable[[str, Shipment], None] = lambda host, shipment: None,
        checks: Checks | None = None,
    ) -> None:
        self.network = network
        self.process = process
        self.rough = rough
        self.on_change = on_change
        self.checks = checks or Checks()
        self.on_send = on_send
        self._links: dict[str, Link] = {}
        self._last_ticket = 0
        self._waiting: dict[Ticket, tuple[str, float]] = {}
        self._ready: list[tuple[Ticket, Outcome]] = []
        self._silent: set[str] = set()
        self._revived: set[str] = set()
        self._arrived = process.threads.Condition()

    @property
    def num_waiting(self) -> int:
        """Tickets without a result."""
        return len(self._waiting)

    def connect(self, hosts: Mapping[str, HostInfo]) -> None:
        for name, link in list(self._links.items()):
            if name not in hosts or not link.leads_to(hosts[name]):
                del self._links[name]
                link.close("no link is wanted any more")
        for name, info in hosts.items():
            if name not in self._links:
                self._links[name] = Link(self, info)
                self._links[name].dial()

    def linked(self) -> frozenset[str]:
        return frozenset(name for name, link in self._links.items() if link.is_up)

    def send(self, host: str, shipment: Shipment, deadline: float) -> Ticket:
        self._last_ticket += 1
        ticket = self._last_ticket
        self.on_send(host, shipment)
        link = self._links.get(host)
        self._waiting[ticket] = (host, deadline)
        trouble = link.send(ticket, shipment, deadline) if link else HostLost(host, "no link is wanted")
        if trouble is not None:
            self.settle(ticket, host, trouble)
        return ticket

    def poll(self, until: float) -> list[tuple[Ticket, Outcome]]:
        world = self.process.world
        self._expire()
        while not self._ready and world.now < until:
            wake = min([until, *(deadline for _, deadline in self._waiting.values())])
            self._arrived.wait(wake - world.now)
            self._expire()
        ready, self._ready = self._ready, []
        return ready

    def revived(self) -> frozenset[str]:
        revived, self._revived = frozenset(self._revived), set()
        return revived

    def close(self) -> None:
        links, self._links = self._links, {}
        self._waiting.clear()
        for link in links.values():
            link.close("the transport is closed")

    def settle(self, ticket: Ticket, host: str, outcome: Outcome) -> None:
        """Something came for `ticket`; dropped when nobody waits for it any more."""
        if host in self._silent and not isinstance(outcome, DeadlinePassed):
            self._silent.discard(host)
            self._revived.add(host)
        if self._waiting.pop(ticket, None) is None:
            return
        if isinstance(outcome, TransportError):
            self.process.note(f"shipment {ticket}: {type(outcome).__name__}, {outcome}")
        if isinstance(outcome, DeadlinePassed):
            self._silent.add(host)
        self._ready.append((ticket, outcome))
        self._arrived.notify_all()

    def _expire(self) -> None:
        now = self.process.world.now
        for ticket, (host, deadline) in list(self._waiting.items()):
            if deadline <= now:
                if self.rough and host in self._links:
                    self._links[host].give_up(ticket)
                self.settle(ticket, host, DeadlinePassed(host, "no answer by the deadline"))


class Link:
    """The wish to reach one life of one host."""

    def __init__(self, owner: VirtualTransport, info: HostInfo) -> None:
        self.is_up = False
        self._owner = owner
        self._info = info
        self._incarnation = info.incarnation
        self._end: End | None = None
        self._closed = False
        self._pause_s = FIRST_PAUSE_S
        self._in_flight: dict[int, int] = {}

    def leads_to(self, info: HostInfo) -> bool:
        """Whether it was meant for that life of the host, or has met it before the view told of it."""
        lives = (self._info.incarnation, self._incarnation)
        return self._info.address == info.address and info.incarnation in lives

    def dial(self) -> None:
        if not self._closed and self._info.address:
            owner = self._owner
            owner.network.dial(owner.process, self._info.address, self._opened, self._ended, rough=owner.rough)

    def close(self, reason: str) -> None:
        self._closed = True
        self._go_down(reason)

    def send(self, ticket: Ticket, shipment: Shipment, deadline: float) -> TransportError | None:
        host = self._info.name
        if self._end is None or not self.is_up:
            return HostLost(host, "not linked")
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            return DeadlinePassed(host, f"{len(self._in_flight)} shipments are unanswered already")
        self._in_flight[ticket] = shipment.rows_TH.shape[0]
        self._end.send(Ask(seq=ticket, shipment=shipment, left_s=deadline - self._owner.process.world.now))
        return None

    def give_up(self, ticket: Ticket) -> None:
        """Its answer may be lost for good, as never in a stream: it must not count as under way for ever."""
        self._in_flight.pop(ticket, None)

    def _opened(self, end: End) -> None:
        if self._closed:
            end.close()
            return
        self._end = end
        end.on_message = self._take
        end.on_end = lambda: self._ended("its stream ended")
        self._owner.process.after(HELLO_S, lambda: self._check_greeted(end))

    def _check_greeted(self, end: End) -> None:
        """A greeting may be lost for good, as never in a stream."""
        if self._end is end and not self.is_up:
            self._ended("nobody greets")

    def _ended(self, reason: str, pause_s: float = 0.0) -> None:
        """Try again after a pause that grows as long as no attempt succeeds."""
        if self._closed:
            return
        self._pause_s = FIRST_PAUSE_S if self.is_up else min(2 * self._pause_s, LAST_PAUSE_S)
        self._go_down(reason)
        self._owner.process.after(pause_s or self._pause_s, self.dial)

    def _take(self, message: Hello | Answer | Corrupt) -> None:
        read = self._read_corrupt(message) if isinstance(message, Corrupt) else message
        if isinstance(read, Hello):
            self._greet(read)
        elif isinstance(read, Answer):
            self._settle(read)
        else:
            self._ended("a frame that nobody can read", REFUSED_PAUSE_S)

    def _read_corrupt(self, corrupt: Corrupt) -> Answer | None:
        """What is left of a damaged frame: its number, unless the damage is there."""
        message = corrupt.message
        if corrupt.in_head or not isinstance(message, Answer):
            return None
        if self._owner.checks.checksum or isinstance(message.outcome, TransportError):
            return replace(message, outcome=BadFrame(self._info.name, "the checksum is wrong"))
        return replace(message, outcome=message.outcome + 1)

    def _greet(self, hello: Hello) -> None:
        if self.is_up:
            return
        if hello.host != self._info.name:
            self._ended(f"host {hello.host} answers", REFUSED_PAUSE_S)
            return
        self.is_up = True
        self._incarnation = hello.incarnation
        self._owner.process.note(f"is linked to {hello.host}.{hello.incarnation}")
        self._pause_s = FIRST_PAUSE_S
        self._owner.on_change()

    def _settle(self, answer: Answer) -> None:
        seq = answer.seq
        if not self._owner.checks.seq and self._in_flight:
            seq = next(iter(self._in_flight))
        num_rows = self._in_flight.pop(seq, None)
        outcome = answer.outcome
        if answer.incarnation != self._incarnation:
            return
        if num_rows is not None and isinstance(outcome, torch.Tensor) and outcome.shape[0] != num_rows:
            outcome = BadFrame(self._info.name, "another number of rows than were sent")
        self._owner.settle(seq, self._info.name, outcome)

    def _go_down(self, reason: str) -> None:
        was_up, self.is_up = self.is_up, False
        end, self._end = self._end, None
        if end is not None:
            end.close()
        lost, self._in_flight = self._in_flight, {}
        for ticket in lost:
            self._owner.settle(ticket, self._info.name, HostLost(self._info.name, reason))
        if was_up:
            self._owner.process.note(f"is not linked to {self._info.name}: {reason}")
            self._owner.on_change()
