"""Routed experts as a service: packs rows into shipments, sends them over a transport, puts the answers together.

All decisions (which replica, what after a failure) are `router.failover`'s; this is the shell that carries them out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from experts.errors import DeadlinePassed, TransportError
from experts.placement import ClusterView, ExpertKey
from experts.transport.base import Segment, Shipment, Ticket, Transport
from router.failover import Answered, Begin, DispatchState, Effect, Event, Failed, Lose, Policy, Reach, Send, step
from router.routed import Combined, Routing, RowGroups, group_rows, to_host, ungroup_rows


@dataclass
class DispatchStats:
    """Plain counters of one router's dispatches; times in seconds."""

    shipments: int = 0
    resends: int = 0
    rows_sent: int = 0
    rows_lost: int = 0
    dispatches: int = 0
    wait_s: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)


class RemoteExperts:
    """Fulfils the decoder's `RoutedExperts` with hosts behind a transport.

    `connect` may be called from any thread; everything else belongs to the thread that runs the decoder.
    """

    def __init__(
        self, transport: Transport, policy: Policy | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.transport = transport
        self.stats = DispatchStats()
        self._policy = policy or Policy()
        self._clock = clock
        self._view = ClusterView()
        self._connecting = threading.Lock()
        self._suspects: set[str] = set()
        self._under_way: dict[Ticket, tuple[RemotePending, int]] = {}

    def connect(self, view: ClusterView) -> None:
        """Use `view` from the next dispatch on."""
        with self._connecting:
            self.transport.connect(view.hosts)
            self._view = view

    def reach(self) -> Reach:
        """The placement and the hosts that are linked and answer in time."""
        self._suspects -= self.transport.revived()
        linked = self.transport.linked()
        # A new link answered its hello: whatever its host was suspected of lies in the past.
        self._suspects &= linked
        return Reach(placement=self._view.placement, usable=linked - self._suspects)

    def available(self, keys: frozenset[ExpertKey]) -> bool:
        """Whether every one of `keys` has a usable host now."""
        if self._under_way or self._suspects:
            self._collect(until=0.0)
        reach = self.reach()
        return all(reach.hosts_of(key) for key in keys)

    def dispatch(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> RemotePending:
        """Send every row on its way; see the decoder's `RoutedExperts`."""
        here_TH, routing = to_host(x_TH, routing)
        pending = RemotePending(self, layer, group_rows(here_TH, routing), routing, x_TH.device)
        self.stats.dispatches += 1
        self._perform(pending, Begin(rows=pending.rows_per_key()))
        return pending

    def wait(self, pending: RemotePending) -> None:
        """Collect answers, of this and other dispatches, until nothing of `pending` is under way."""
        began = self._clock()
        while pending.state.waiting:
            self._collect(until=self._clock() + self._policy.base_s)
        self.stats.wait_s += self._clock() - began

    def _collect(self, until: float) -> None:
        arrived = self.transport.poll(until)
        # Suspicions first: deciding about one failure must not overlook another of the same moment.
        for _, result in arrived:
            if isinstance(result, TransportError):
                self._note(result)
        for ticket, result in arrived:
            pending, shipment = self._under_way.pop(ticket)
            if isinstance(result, TransportError):
                self._perform(pending, Failed(shipment=shipment))
            else:
                pending.accept(shipment, result)
                self._perform(pending, Answered(shipment=shipment))

    def _note(self, error: TransportError) -> None:
        kind = type(error).__name__
        self.stats.failures[kind] = self.stats.failures.get(kind, 0) + 1
        if isinstance(error, DeadlinePassed):
            self._suspects.add(error.host)

    def _perform(self, pending: RemotePending, event: Event) -> None:
        reach = self.reach() if not isinstance(event, Answered) else _NOWHERE
        pending.state, effects = step(pending.state, event, reach, self._clock(), self._policy)
        for effect in effects:
            self._carry_out(pending, effect, reach.placement.epoch, resend=isinstance(event, Failed))

    def _carry_out(self, pending: RemotePending, effect: Effect, epoch: int, *, resend: bool) -> None:
        if isinstance(effect, Lose):
            pending.lost.update(effect.keys)
            self.stats.rows_lost += sum(pending.state.rows[key] for key in effect.keys)
            return
        shipment = pending.shipment(effect, epoch)
        ticket = self.transport.send(effect.host, shipment, effect.deadline)
        self._under_way[ticket] = (pending, effect.shipment)
        self.stats.shipments += 1
        self.stats.resends += resend
        self.stats.rows_sent += shipment.rows_TH.shape[0]


_NOWHERE = Reach(placement=ClusterView().placement, usable=frozenset())


class RemotePending:
    """Rows of one layer under way. Owned by `RemoteExperts`; the decoder only calls `combine`."""

    def __init__(
        self, owner: RemoteExperts, layer: int, groups: RowGroups, routing: Routing, device: torch.device
    ) -> None:
        """`groups` and `routing` are in the host's memory, what is combined goes to `device`."""
        self.state = DispatchState()
        self.lost: set[ExpertKey] = set()
        self._owner = owner
        self._groups = groups
        self._routing = routing
        self._device = device
        self._rows_RH = groups.rows_RH
        self._y_RH = torch.zeros_like(self._rows_RH)
        self._place: dict[ExpertKey, slice] = {}
        self._sent: dict[int, tuple[ExpertKey, ...]] = {}
        begin = 0
        for expert, count in zip(groups.experts, groups.counts, strict=True):
            self._place[layer, expert] = slice(begin, begin + count)
            begin += count

    def rows_per_key(self) -> dict[ExpertKey, int]:
        return {key: place.stop - place.start for key, place in self._place.items()}

    def shipment(self, send: Send, epoch: int) -> Shipment:
        """The rows of the experts that `send` names, expert after expert."""
        self._sent[send.shipment] = send.keys
        places = [self._place[key] for key in send.keys]
        segments = tuple(
            Segment(layer=layer, expert=expert, num_rows=place.stop - place.start)
            for (layer, expert), place in zip(send.keys, places, strict=True)
        )
        whole = len(places) == len(self._place)
        rows_TH = self._rows_RH if whole else torch.cat([self._rows_RH[place] for place in places])
        return Shipment(segments=segments, rows_TH=rows_TH, epoch=epoch)

    def accept(self, shipment: int, result_TH: torch.Tensor) -> None:
        """Put a shipment's answer in its place."""
        begin = 0
        for key in self._sent.pop(shipment):
            place = self._place[key]
            end = begin + place.stop - place.start
            self._y_RH[place] = result_TH[begin:end]
            begin = end

    def combine(self) -> Combined:
        """Wait for the rows under way (each shipment has a deadline) and sum them per token."""
        self._owner.wait(self)
        y_TH = ungroup_rows(self._groups, self._y_RH, self._routing)
        return Combined(y_TH=y_TH.to(self._device), lost=self._lost_rows())

    def _lost_rows(self) -> dict[int, tuple[ExpertKey, ...]]:
        lost: dict[int, tuple[ExpertKey, ...]] = {}
        num_choices = self._routing.expert_TK.shape[1]
        for key in sorted(self.lost):
            for choice in self._groups.choice_R[self._place[key]].tolist():
                lost[choice // num_choices] = (*lost.get(choice // num_choices, ()), key)
        return lost
