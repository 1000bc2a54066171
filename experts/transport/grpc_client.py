"""The gRPC transport: one link per host, each with a channel, a stream and threads of its own.

Deadlines are kept here, by `poll`, whatever a host does; a link only knows that its stream lives or has ended. So a
stopped host costs its own tickets their deadline and nobody else anything.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping

from experts.errors import DeadlinePassed, HostLost, TransportError
from experts.link_terms import LinkTerms
from experts.placement import HostInfo
from experts.tls import Identity
from experts.transport.base import Shipment, Ticket
from experts.transport.grpc_link import Arrival, Link, LinkSetup, Outcome, Reconnect
from experts.wire.codec import DEFAULT_MAX_MESSAGE_BYTES

_LONGEST_WAIT_S = 3600.0
"""A wait is cut into pieces that the clock functions take, however far the deadline."""


class GrpcTransport:
    """Links to host processes; see `experts.transport.base.Transport`.

    A host is linked from the moment that it answers the hello until its stream ends; an ended link is formed anew,
    with growing pauses, as long as `connect` names the host. `on_change` is called, from any thread, after `linked()`
    changed. A link carries at most `max_in_flight` unanswered shipments: a further one fails at once with
    DeadlinePassed, because a host that far behind is as suspect as one that misses a deadline (and shows up in
    `revived()` in the same way). The rows of a shipment must not change after `send`. Without `tls` only hosts at
    loopback addresses are linked, all with `insecure`.
    """

    def __init__(
        self,
        *,
        router_name: str,
        terms: LinkTerms,
        on_change: Callable[[], None] | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        max_in_flight: int = 64,
        reconnect: Reconnect | None = None,
        tls: Identity | None = None,
        insecure: bool = False,
    ) -> None:
        self._arrived: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._setup = LinkSetup(
            router_name=router_name,
            terms=terms,
            on_change=on_change or (lambda: None),
            arrived=self._arrived,
            max_message_bytes=max_message_bytes,
            max_in_flight=max_in_flight,
            reconnect=reconnect or Reconnect(),
            tls=tls,
            insecure=insecure,
        )
        # Replaced, never changed, so that it can be read without the lock.
        self._links: Mapping[str, Link] = {}
        self._retired: list[Link] = []
        self._connecting = threading.Lock()
        self._closed = False
        # What follows belongs to the one thread that sends and polls.
        self._last_ticket = 0
        self._waiting: dict[Ticket, tuple[str, float]] = {}
        self._ready: list[tuple[Ticket, Outcome]] = []
        self._silent: set[str] = set()
        self._revived: set[str] = set()

    def connect(self, hosts: Mapping[str, HostInfo]) -> None:
        with self._connecting:
            if self._closed:
                return
            old = self._links
            kept = {name: link for name, link in old.items() if name in hosts and link.leads_to(hosts[name])}
            new = {name: Link(info, self._setup) for name, info in hosts.items() if name not in kept}
            ended = [link for name, link in old.items() if name not in kept]
            self._retired = [link for link in self._retired if link.is_alive()] + ended
            self._links = {**kept, **new}
            for link in new.values():
                link.start()
        for link in ended:
            link.close()

    def linked(self) -> frozenset[str]:
        return frozenset(name for name, link in self._links.items() if link.is_up)

    def send(self, host: str, shipment: Shipment, deadline: float) -> Ticket:
        self._last_ticket += 1
        ticket = self._last_ticket
        link = self._links.get(host)
        trouble = link.send(ticket, shipment, deadline) if link else HostLost(host, "no link is wanted")
        if trouble is None:
            self._waiting[ticket] = (host, deadline)
        else:
            self._fail(ticket, trouble)
        return ticket

    def poll(self, until: float) -> list[tuple[Ticket, Outcome]]:
        while True:
            self._take_arrivals()
            self._expire(time.monotonic())
            if self._ready:
                ready, self._ready = self._ready, []
                return ready
            now = time.monotonic()
            if now >= until:
                return []
            self._await_arrival(min([until, *(deadline for _, deadline in self._waiting.values())]) - now)

    def revived(self) -> frozenset[str]:
        self._take_arrivals()
        revived, self._revived = frozenset(self._revived), set()
        return revived

    def close(self) -> None:
        """End all links and their threads; returns when the threads are gone."""
        with self._connecting:
            self._closed = True
            links = [*self._links.values(), *self._retired]
            self._links, self._retired = {}, []
        for link in links:
            link.close()
        for link in links:
            link.join()

    def _await_arrival(self, timeout_s: float) -> None:
        try:
            self._sort(self._arrived.get(timeout=min(max(0.0, timeout_s), _LONGEST_WAIT_S)))
        except queue.Empty:
            return

    def _take_arrivals(self) -> None:
        # Nobody else takes any, so what is there stays there.
        while not self._arrived.empty():
            self._sort(self._arrived.get_nowait())

    def _sort(self, arrival: Arrival) -> None:
        """A host answers in turn, so whatever comes from a silent one ends its silence; so does the end of its link,
        for a new one begins with an answer."""
        waited_for = self._waiting.pop(arrival.ticket, None) is not None
        if waited_for and isinstance(arrival.outcome, TransportError):
            self._fail(arrival.ticket, arrival.outcome)
        elif waited_for:
            self._ready.append((arrival.ticket, arrival.outcome))
        if arrival.host in self._silent:
            self._silent.discard(arrival.host)
            self._revived.add(arrival.host)

    def _fail(self, ticket: Ticket, error: TransportError) -> None:
        if isinstance(error, DeadlinePassed):
            self._silent.add(error.host)
        self._ready.append((ticket, error))

    def _expire(self, now: float) -> None:
        for ticket, (host, deadline) in list(self._waiting.items()):
            if deadline <= now:
                del self._waiting[ticket]
                link = self._links.get(host)
                if link is not None:
                    link.renew_if_stale(now)
                self._fail(ticket, DeadlinePassed(host, "no answer by the deadline"))
