"""What others get to see of the controller's state: the view for members and the status for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType

from cluster.control.costs import costs_of
from cluster.control.loop import imbalances
from cluster.control.state import ControllerState, HostState
from cluster.control.steer import doubt_of, expert_bytes, fleet_of, is_sick
from experts.placement import ClusterView, HostInfo, IngressInfo, RouterInfo
from experts.reports import ClusterStatus, ControllerInfo, HostReport, MemberKind, MemberReport, PlacementStatus

ALARM_S = 60.0
"""How long an alarm counts among the problems of now."""


def view_of(state: ControllerState, version: int) -> ClusterView:
    """The view to publish: hosts that ever reported, routers that report, and the placement of the journal."""
    costs = costs_of(state.hosts)
    hosts = {
        name: replace(host_info(name, host), cost=costs[name])
        for name, host in state.hosts.items()
        if host.report is not None
    }
    routers = {
        name: router_info(member.report)
        for name, member in state.members.items()
        if member.report.kind is MemberKind.ROUTER
    }
    return ClusterView(
        version=version,
        placement=state.placement,
        hosts=MappingProxyType(hosts),
        routers=MappingProxyType(routers),
        draining=state.draining,
    )


def status_of(state: ControllerState, name: str, controller: ControllerInfo) -> ClusterStatus:
    """Everything, with the numbers of the last reports. `controller` carries what only the process knows."""
    members = [member.report for _, member in sorted(state.members.items())]
    here = [host for name, host in state.hosts.items() if name not in state.journal.away]
    wanted = sum(len(host.duty) for host in here)
    held = sum(len(_held(host) & host.duty) for host in here)
    hosts = [host_info(host_name, host) for host_name, host in state.hosts.items()]
    inner = [report.inner_host for report in members if report.inner_host is not None]
    return ClusterStatus(
        name=name,
        controller=replace(controller, epoch=state.journal.epoch, version=state.version, term=state.journal.term),
        ingresses=tuple(_ingress_info(report) for report in members if report.kind is MemberKind.INGRESS),
        routers=tuple(router_info(report) for report in members if report.kind is MemberKind.ROUTER),
        hosts=(*hosts, *(_inner_host_info(report) for report in inner)),
        replicas_held=held,
        replicas_wanted=wanted,
        draining=state.draining,
        problems=tuple(_problems(state)),
        placement=placement_of(state),
    )


def placement_of(state: ControllerState) -> PlacementStatus:
    """How experts are placed and moved."""
    trusted, goal = state.planning.trusted, state.moving.goal
    known = trusted is not None and trusted.rows.keys() == state.moving.published.keys()
    measured = [applied for applied in state.journal.history if applied.realised is not None]
    last = measured[-1] if measured else None
    return PlacementStatus(
        rebalances=state.steering.rebalances,
        held_by=_held_by(state),
        is_moving=not state.moving.is_done or bool(state.journal.draining & state.hosts.keys()),
        loading=len(state.moving.loading),
        draining=len(state.moving.draining),
        loaded_total=state.num_loaded,
        given_up_total=state.num_given_up,
        plans_total=len(state.journal.history),
        expert_bytes=expert_bytes(state),
        imbalance=imbalances(trusted, fleet_of(state), state.moving.published) if trusted and known else {},
        replicas={key: len(state.journal.replicas.get(key, ())) for key in goal},
        predicted=last.predicted if last else None,
        realised=last.realised if last else None,
    )


def _held_by(state: ControllerState) -> str:
    if not state.steering.rebalances:
        return "rebalancing is off"
    if state.ticked_at < state.journal.kept_until:
        return f"a person moved experts; the load is acted upon in {state.journal.kept_until - state.ticked_at:.0f} s"
    return doubt_of(state)


def host_info(name: str, host: HostState) -> HostInfo:
    """A wanted host; with nothing but its name while it has never reported."""
    report = host.report
    if report is None:
        return HostInfo(name=name, incarnation=0, address="", slots_target=len(host.duty))
    return replace(
        _inner_host_info(report), state=host_phase(host), slots=len(_held(host)), slots_target=len(host.duty)
    )


def host_phase(host: HostState) -> str:
    """loading, ready or lost."""
    if host.lost:
        return "lost"
    return "ready" if host.report is not None and host.duty <= host.report.held else "loading"


def router_info(report: MemberReport) -> RouterInfo:
    return RouterInfo(
        name=report.name,
        address=report.address,
        node=report.node,
        pid=report.pid,
        state=report.state,
        running=report.running,
        waiting=report.waiting,
        metrics_address=report.metrics_address,
        max_model_len=report.max_model_len,
        kv_tokens=report.kv_tokens,
    )


def _ingress_info(report: MemberReport) -> IngressInfo:
    return IngressInfo(
        name=report.name,
        node=report.node,
        pid=report.pid,
        http=report.http,
        metrics_address=report.metrics_address,
    )


def _inner_host_info(report: HostReport) -> HostInfo:
    return HostInfo(
        name=report.name,
        incarnation=report.incarnation,
        address=report.address,
        node=report.node,
        pid=report.pid,
        state="ready",
        transport=report.transport,
        slots=len(report.held),
        slots_target=len(report.held),
        rows_total=report.rows_total,
        metrics_address=report.metrics_address,
        cost=report.cost,
    )


def _held(host: HostState) -> frozenset[tuple[int, int]]:
    """A lost host holds nothing that anybody could use."""
    return frozenset() if host.report is None or host.lost else host.report.held


def _problems(state: ControllerState) -> Iterator[str]:
    yield from (text for at, text in state.alarms if state.ticked_at - at < ALARM_S)
    if state.plan is not None:
        # That the load is not known is told elsewhere: it may be no problem.
        yield from (text for text in state.plan.alarms if not state.plan.held_by or state.plan.held_by not in text)
    for name, host in state.hosts.items():
        if host.lost:
            others = "; other hosts hold its experts meanwhile" if name in state.journal.away else ""
            yield f"host {name} is lost: no report for over {state.timing.lost_after:.0f} s{others}"
        elif is_sick(host, state):
            yield f"host {name} is there, but routers cannot use it: it is given no experts"
        if host.report is not None and host.report.problem:
            yield f"host {name}: {host.report.problem}"
    for name, member in sorted(state.members.items()):
        if member.report.problem:
            yield f"{member.report.kind} {name}: {member.report.problem}"
