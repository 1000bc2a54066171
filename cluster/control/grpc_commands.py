"""What `herd plan`, `move`, `apply`, `rollback`, `drain` and `trace` ask of the controller, and what they are told."""

from __future__ import annotations

import json
from collections.abc import Callable

from cluster.control.explain import as_json, as_text
from cluster.control.fleet import Load
from cluster.control.loop import Applied
from cluster.control.plan import difference
from cluster.control.state import (
    Asked,
    ControllerState,
    HostDrainAsked,
    HostsAsked,
    MoveAsked,
    PlanAsked,
    RollbackAsked,
    TargetAsked,
)
from cluster.control.steer import preview
from cluster.control.trust import doubt_load
from experts.errors import InvalidInput
from experts.reports import AppliedPlan, CountedRows
from experts.wire import control_pb2 as pb
from experts.wire.placing import counted_to_wire, plan_to_wire, rates_from_wire, refusal_to_wire, replicas_from_wire
from experts.wire.view import keys_to_wire


class Commands:
    """Requests in, responses out. `feed` takes an event in, and raises InvalidInput for what cannot be done."""

    def __init__(
        self, state: Callable[[], ControllerState], feed: Callable[[Asked], None], clock: Callable[[], float]
    ) -> None:
        self._state = state
        self._feed = feed
        self._clock = clock

    def plan(self, request: pb.PlanRequest) -> pb.PlanResponse:
        try:
            load = self._load_of(request)
            made = preview(self._state(), load, self._clock())
            if request.apply:
                self._feed(PlanAsked(load=load))
        except InvalidInput as error:
            return pb.PlanResponse(refusal=refusal_to_wire(error))
        return pb.PlanResponse(text=as_text(made), json=json.dumps(as_json(made)))

    def place(self, request: pb.PlaceRequest) -> pb.PlaceResponse:
        before = self._state().moving.goal
        try:
            self._feed(_asked(request))
        except InvalidInput as error:
            return pb.PlaceResponse(refusal=refusal_to_wire(error))
        state = self._state()
        loads, _ = difference(before, state.moving.goal)
        return pb.PlaceResponse(loads=len(loads), epoch=state.journal.epoch)

    def history(self) -> pb.HistoryResponse:
        now = self._clock()
        return pb.HistoryResponse(plans=[plan_to_wire(_told(one, now)) for one in self._state().journal.history])

    def rows(self) -> pb.RowsResponse:
        state = self._state()
        reports = [host.report for host in state.hosts.values() if host.report is not None]
        counted = [CountedRows(host=one.name, incarnation=one.incarnation, rows=one.rows) for one in reports]
        return pb.RowsResponse(hosts=[counted_to_wire(one) for one in counted], experts=keys_to_wire(state.moving.goal))

    def _load_of(self, request: pb.PlanRequest) -> Load | None:
        """The load that a command brings along. Raises InvalidInput."""
        if not request.load:
            return None
        try:
            rows = rates_from_wire(request.load)
        except ValueError:
            raise InvalidInput("load", "rows", "must be as many as experts") from None
        known = self._state().planning.trusted
        load = Load(at=self._clock(), rows=rows, dispatches=known.dispatches if known else 0.0)
        doubt = doubt_load(load, self._state().moving.goal, load.at, 1.0)
        if doubt:
            raise InvalidInput("load", doubt, "must be of every expert that the model has")
        return load


def _asked(request: pb.PlaceRequest) -> Asked:
    """Raises InvalidInput."""
    match request.WhichOneof("what"):
        case "move":
            move = request.move
            return MoveAsked(key=(move.layer, move.expert), to=move.to)
        case "drain_host":
            return HostDrainAsked(name=request.drain_host)
        case "num_hosts":
            return HostsAsked(number=request.num_hosts)
        case "placement":
            try:
                return TargetAsked(replicas=replicas_from_wire(request.placement))
            except ValueError as error:
                raise InvalidInput("plan", str(error), "must name its hosts") from None
        case "rollback":
            rollback = request.rollback
            return RollbackAsked(epoch=rollback.epoch if rollback.HasField("epoch") else None)
    raise InvalidInput("request", "nothing", "must ask for something that this controller knows")


def _told(applied: Applied, now: float) -> AppliedPlan:
    return AppliedPlan(
        age_s=now - applied.at,
        epoch=applied.epoch,
        loads=applied.loads,
        moved_bytes=applied.moved_bytes,
        before=applied.before,
        predicted=applied.predicted,
        realised=applied.realised,
        took_s=applied.took_s,
        why=applied.why,
        is_undone=applied.is_undone,
    )
