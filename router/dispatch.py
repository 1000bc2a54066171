"""Routed experts as a service: packs rows into shipments, sends them over a transport, puts the answers together.

All decisions (which replica, what after a failure) are `router.failover`'s; this is the shell that carries them out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch

from experts.errors import BadFrame, DeadlinePassed, HostFailed, HostLost, NotHosted, TransportError
from experts.placement import ClusterView, ExpertKey
from experts.transport.base import Segment, Shipment, Ticket, Transport
from router.dispatch_stats import DispatchStats
from router.failover.core import step
from router.failover.events import (
    Answered,
    Begin,
    Effect,
    Entered,
    Event,
    Failed,
    HostState,
    Linked,
    Looked,
    Lose,
    Probe,
    Reason,
    Revived,
    RowsOf,
    Send,
    StepBegun,
    Take,
    Tick,
    Viewed,
)
from router.failover.state import FailoverState, Policy, is_available, next_timer
from router.histogram import Histogram
from router.routed import Combined, Routing, RowGroups, group_rows, to_host, ungroup_rows

SHORTEST_WAIT_S = 5e-4
_REASON_OF: dict[type[TransportError], Reason] = {
    HostLost: Reason.LOST,
    DeadlinePassed: Reason.DEADLINE,
    NotHosted: Reason.NOT_HOSTED,
    HostFailed: Reason.FAILED,
    BadFrame: Reason.BAD_FRAME,
}


class RemoteExperts:
    """Fulfils the decoder's `RoutedExperts` with hosts behind a transport.

    `connect` may be called from any thread; everything else belongs to the thread that runs the decoder. `node` is
    where this router runs. `clock` is monotonic and the transport's too; `wall` only stamps what operators see.
    """

    def __init__(
        self,
        transport: Transport,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        node: str = "",
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.transport = transport
        self._clock = clock
        self._wall = wall
        self._state = FailoverState(policy=policy or Policy(), node=node)
        self.stats = DispatchStats(hedges=self._state.hedges, failovers=self._state.failovers)
        self._connecting = threading.Lock()
        self._view = self._seen = ClusterView()
        self._linked: frozenset[str] | None = None
        self._silent: set[str] = set()
        self._dispatches = 0
        self._pendings: dict[int, RemotePending] = {}
        self._under_way: dict[Ticket, int] = {}
        self._nothing_TH = torch.empty(0, 1)

    def connect(self, view: ClusterView) -> None:
        """Hold links to the hosts of `view` now, and use its placement from the next step on."""
        with self._connecting:
            self.transport.connect(view.hosts)
            self._view = view

    def begin_step(self, give_up_at: float = float("inf")) -> None:
        """A step begins, with the newest placement; what it cannot get by `give_up_at` nobody waits for any more."""
        now = self._clock()
        self._sync(now)
        self._decide(StepBegun(give_up_at=give_up_at), now)
        self.stats.epoch = self._state.placement.epoch

    def available(self, keys: frozenset[ExpertKey]) -> bool:
        """Whether a step begun now would find a host for every one of `keys`."""
        self._look(until=0.0)
        self.stats.epoch = self._state.newest.epoch
        return is_available(self._state, keys)

    def dispatch(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> RemotePending:
        """Send every row on its way; see the decoder's `RoutedExperts`."""
        here_TH, routing = to_host(x_TH, routing)
        # First what is there already: it may tell who is slow.
        self._look(until=0.0)
        now = self._clock()
        self._dispatches += 1
        pending = RemotePending(self, self._dispatches, layer, group_rows(here_TH, routing), routing, x_TH.device, now)
        self._nothing_TH = here_TH[:0]
        self.stats.dispatches += 1
        self._pendings[pending.number] = pending
        self._decide(Begin(dispatch=pending.number, rows=pending.rows_per_key()), now)
        self._forget_if_done(pending.number)
        return pending

    def wait(self, number: int) -> None:
        """Collect answers, of this and other dispatches, until every row of dispatch `number` is here or lost."""
        began = self._clock()
        while number in self._state.dispatches:
            self._look(until=max(next_timer(self._state), self._clock() + SHORTEST_WAIT_S))
        self.stats.wait_s += self._clock() - began

    def _look(self, until: float) -> None:
        """Take what has come until `until`, all of it, and only then judge who is late."""
        arrived = self.transport.poll(until)
        now = self._clock()
        self._decide(Looked(until=until), now)
        errors = [result for _, result in arrived if isinstance(result, TransportError)]
        for error in errors:
            self.stats.failures[type(error).__name__] += 1
        # Who is gone first: what failed on one host must not be sent to another that is gone, too.
        self._sync(now)
        for ticket, result in arrived:
            self._take_result(self._under_way.pop(ticket), result, now)
        if any(isinstance(error, HostLost) for error in errors):
            # It may be linked again already, which nothing else would tell.
            self._linked = None
            self._sync(now)
        if self._silent or any(isinstance(error, DeadlinePassed) for error in errors):
            self._decide(Revived(hosts=self.transport.revived()), now)
        self._decide(Tick(), now)

    def _sync(self, now: float) -> None:
        """Tell of a new view and of links that came or went."""
        view = self._view
        if view is not self._seen:
            self._seen, self._linked = view, None
            self.stats.hosts = {name: str(HostState.DEAD) for name in view.hosts} | {
                name: state for name, state in self.stats.hosts.items() if name in view.hosts
            }
            self._decide(Viewed(view=view), now)
        linked = self.transport.linked()
        if linked != self._linked:
            self._linked = linked
            self._decide(Linked(hosts=linked), now)

    def _take_result(self, shipment: int, result: torch.Tensor | TransportError, now: float) -> None:
        if isinstance(result, TransportError):
            missing = result.missing if isinstance(result, NotHosted) else frozenset()
            self._decide(Failed(shipment=shipment, reason=_REASON_OF[type(result)], missing=missing), now)
        else:
            self._decide(Answered(shipment=shipment), now, result)

    def _decide(self, event: Event, now: float, result_TH: torch.Tensor | None = None) -> None:
        """Let the machine decide and carry its decisions out. `result_TH` is the answer that `event` tells of."""
        began = time.perf_counter()
        self._state, effects = step(self._state, event, now)
        self.stats.decision_s += time.perf_counter() - began
        self.stats.decisions += 1
        for effect in effects:
            self._carry_out(effect, now, result_TH)
        # Only now: several of them may end one dispatch together.
        for effect in effects:
            if isinstance(effect, Take | Lose):
                self._forget_if_done(effect.dispatch)

    def _carry_out(self, effect: Effect, now: float, result_TH: torch.Tensor | None) -> None:
        match effect:
            case Send():
                self._send(effect)
            case Take():
                assert result_TH is not None
                self._pendings[effect.dispatch].accept(effect.shipment, effect.parts, result_TH, now)
            case Lose():
                self._pendings[effect.dispatch].lose(effect.parts)
                self.stats.rows_lost += sum(part.stop - part.start for part in effect.parts)
            case Probe():
                shipment = Shipment(segments=(), rows_TH=self._nothing_TH, epoch=self._state.placement.epoch)
                self._under_way[self.transport.send(effect.host, shipment, effect.deadline)] = effect.shipment
                self.stats.probes += 1
            case Entered():
                self._note(effect)

    def _send(self, send: Send) -> None:
        pending = self._pendings[send.dispatch]
        shipment = pending.shipment(send, self._state.placement.epoch)
        self._under_way[self.transport.send(send.host, shipment, send.deadline)] = send.shipment
        self.stats.shipments += 1
        self.stats.resends += not send.is_first
        self.stats.rows_sent += shipment.rows_TH.shape[0]

    def _note(self, entered: Entered) -> None:
        self.stats.hosts[entered.host] = str(entered.state)
        self.stats.entered_at[entered.host, str(entered.state)] = self._wall()
        (self._silent.add if entered.state is HostState.SILENT else self._silent.discard)(entered.host)

    def _forget_if_done(self, number: int) -> None:
        if number in self._state.dispatches:
            return
        pending = self._pendings.pop(number, None)
        if pending is not None and pending.layer not in self.stats.round_trips:
            self.stats.round_trips[pending.layer] = Histogram()
        if pending is not None:
            self.stats.round_trips[pending.layer].add(pending.took_s)


class RemotePending:
    """Rows of one layer under way. Owned by `RemoteExperts`; the decoder only calls `combine`."""

    def __init__(
        self,
        owner: RemoteExperts,
        number: int,
        layer: int,
        groups: RowGroups,
        routing: Routing,
        device: torch.device,
        began: float,
    ) -> None:
        """`groups` and `routing` are in the host's memory, what is combined goes to `device`."""
        self.number = number
        self.layer = layer
        self.took_s = 0.0
        self._owner = owner
        self._groups = groups
        self._routing = routing
        self._device = device
        self._began = began
        self._rows_RH = groups.rows_RH
        self._y_RH = torch.zeros_like(self._rows_RH)
        self._lost: list[RowsOf] = []
        self._sent: dict[int, tuple[RowsOf, ...]] = {}
        self._begin: dict[ExpertKey, int] = {}
        begin = 0
        for expert, count in zip(groups.experts, groups.counts, strict=True):
            self._begin[layer, expert] = begin
            begin += count

    def rows_per_key(self) -> dict[ExpertKey, int]:
        return dict(zip(self._begin, self._groups.counts, strict=True))

    def shipment(self, send: Send, epoch: int) -> Shipment:
        """The rows that `send` names, part after part."""
        self._sent[send.shipment] = send.parts
        segments = tuple(
            [Segment(layer=key[0], expert=key[1], num_rows=stop - start) for key, start, stop in send.parts]
        )
        whole = sum(segment.num_rows for segment in segments) == self._rows_RH.shape[0]
        rows_TH = self._rows_RH if whole else torch.cat([self._rows_RH[self._place(part)] for part in send.parts])
        return Shipment(segments=segments, rows_TH=rows_TH, epoch=epoch)

    def accept(self, shipment: int, wanted: Sequence[RowsOf], result_TH: torch.Tensor, now: float) -> None:
        """Put what is wanted of a shipment's answer in its place."""
        sent = self._sent.pop(shipment)
        takes_all = len(sent) == len(wanted)
        begin = 0
        for part in sent:
            end = begin + part.stop - part.start
            if takes_all or part in wanted:
                self._y_RH[self._place(part)] = result_TH[begin:end]
            begin = end
        self.took_s = now - self._began

    def lose(self, parts: Sequence[RowsOf]) -> None:
        self._lost += parts

    def combine(self) -> Combined:
        """Wait for the rows under way (each shipment has a deadline) and sum them per token."""
        self._owner.wait(self.number)
        y_TH = ungroup_rows(self._groups, self._y_RH, self._routing)
        return Combined(y_TH=y_TH.to(self._device), lost=self._lost_rows())

    def _place(self, part: RowsOf) -> slice:
        begin = self._begin[part.key]
        return slice(begin + part.start, begin + part.stop)

    def _lost_rows(self) -> dict[int, tuple[ExpertKey, ...]]:
        lost: dict[int, tuple[ExpertKey, ...]] = {}
        num_choices = self._routing.expert_TK.shape[1]
        for part in sorted(self._lost):
            for choice in self._groups.choice_R[self._place(part)].tolist():
                lost[choice // num_choices] = (*lost.get(choice // num_choices, ()), part.key)
        return lost
