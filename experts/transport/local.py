"""The transport of one process: a shipment is a function call. Beside it the same with links that can be broken.

A shipment is computed inside `send`; its result is there at the next `poll`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from experts.errors import DeadlinePassed, HostLost, TransportError
from experts.host import ExpertHost
from experts.placement import HostInfo
from experts.transport.base import Shipment, Ticket

Outcome = torch.Tensor | TransportError


class LocalTransport:
    """Links to hosts of this process; see `experts.transport.base.Transport`.

    A host is linked when `connect` names it and it is one of `hosts`. What a call returns is its result even when
    the call took longer than the deadline: there was no moment at which to give up on it.
    """

    def __init__(self, hosts: Mapping[str, ExpertHost], on_change: Callable[[], None] | None = None) -> None:
        self._hosts = dict(hosts)
        self._on_change = on_change or (lambda: None)
        self._linked: frozenset[str] = frozenset()
        self._last_ticket = 0
        self._ready: list[tuple[Ticket, Outcome]] = []

    def connect(self, hosts: Mapping[str, HostInfo]) -> None:
        linked = frozenset(hosts) & frozenset(self._hosts)
        changed = linked != self._linked
        self._linked = linked
        if changed:
            self._on_change()

    def linked(self) -> frozenset[str]:
        return self._linked

    def send(self, host: str, shipment: Shipment, deadline: float) -> Ticket:
        self._last_ticket += 1
        self._ready.append((self._last_ticket, self._answer(host, shipment)))
        return self._last_ticket

    def poll(self, until: float) -> list[tuple[Ticket, Outcome]]:
        if not self._ready:
            time.sleep(max(0.0, until - time.monotonic()))
        ready, self._ready = self._ready, []
        return ready

    def revived(self) -> frozenset[str]:
        return frozenset()

    def close(self) -> None:
        self._linked = frozenset()
        self._ready = []

    def _answer(self, host: str, shipment: Shipment) -> Outcome:
        if host not in self.linked():
            return HostLost(host, "not linked")
        try:
            return self._hosts[host].compute(shipment)
        except TransportError as error:
            return error


@dataclass(frozen=True, kw_only=True)
class _Held:
    host: str
    shipment: Shipment
    deadline: float


class FaultyLocalTransport(LocalTransport):
    """For tests: a LocalTransport whose links can be lost, stalled and restored, from any thread."""

    def __init__(self, hosts: Mapping[str, ExpertHost], on_change: Callable[[], None] | None = None) -> None:
        super().__init__(hosts, on_change)
        self._changed = threading.Condition()
        self._infos: dict[str, HostInfo] = {}
        self._lost: frozenset[str] = frozenset()
        self._stalled: set[str] = set()
        self._held: dict[Ticket, _Held] = {}
        self._owing: set[str] = set()
        self._revived: set[str] = set()

    def lose(self, host: str) -> None:
        """End the link to `host`, as its death would."""
        with self._changed:
            self._lost |= {host}
            self._stalled.discard(host)
            self._end(host)
        self._on_change()

    def stall(self, host: str) -> None:
        """Let `host` answer nothing until it is restored or lost, as a stopped process would."""
        with self._changed:
            self._stalled.add(host)

    def restore(self, host: str) -> None:
        """Undo `lose` and `stall`: what is still waited for is answered now."""
        with self._changed:
            relinked = host in self._lost
            self._lost -= {host}
            self._stalled.discard(host)
            if host in self._owing:
                self._owing.discard(host)
                self._revived.add(host)
            for ticket in self._held_by(host):
                self._ready.append((ticket, self._answer(host, self._held.pop(ticket).shipment)))
            self._changed.notify_all()
        if relinked:
            self._on_change()

    def connect(self, hosts: Mapping[str, HostInfo]) -> None:
        with self._changed:
            for name, info in self._infos.items():
                new = hosts.get(name)
                if new is None or (new.incarnation, new.address) != (info.incarnation, info.address):
                    self._end(name)
            self._infos = dict(hosts)
        super().connect(hosts)

    def linked(self) -> frozenset[str]:
        return super().linked() - self._lost

    def send(self, host: str, shipment: Shipment, deadline: float) -> Ticket:
        with self._changed:
            if host not in self._stalled or host not in self.linked():
                return super().send(host, shipment, deadline)
            self._last_ticket += 1
            self._held[self._last_ticket] = _Held(host=host, shipment=shipment, deadline=deadline)
            return self._last_ticket

    def poll(self, until: float) -> list[tuple[Ticket, Outcome]]:
        with self._changed:
            self._expire()
            while not self._ready and time.monotonic() < until:
                wake = min([until, *(held.deadline for held in self._held.values())])
                self._changed.wait(max(0.0, wake - time.monotonic()))
                self._expire()
            ready, self._ready = self._ready, []
            return ready

    def revived(self) -> frozenset[str]:
        with self._changed:
            revived, self._revived = frozenset(self._revived), set()
            return revived

    def _end(self, host: str) -> None:
        if host in self._owing:
            self._owing.discard(host)
            self._revived.add(host)
        for ticket in self._held_by(host):
            del self._held[ticket]
            self._ready.append((ticket, HostLost(host, "its link ended")))
        self._changed.notify_all()

    def _held_by(self, host: str) -> list[Ticket]:
        return [ticket for ticket, held in self._held.items() if held.host == host]

    def _expire(self) -> None:
        now = time.monotonic()
        for ticket, held in list(self._held.items()):
            if held.deadline <= now:
                del self._held[ticket]
                self._owing.add(held.host)
                self._ready.append((ticket, DeadlinePassed(held.host, "no answer by the deadline")))
