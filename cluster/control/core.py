"""The controller's rules: `step(state, event, now) -> (state, effects)`. No clock, no network, no process.

Invariants: the epoch only grows, and only with the published placement; the placement lists only replicas that a
host reported as held; the journal is written before the view that it backs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from cluster.control.asked import ask
from cluster.control.hosts import follow_use, welcome, without_host
from cluster.control.moves import to_hold
from cluster.control.pack import spread
from cluster.control.replicas import Replicas
from cluster.control.state import (
    ControllerState,
    DrainAsked,
    Effect,
    EndHost,
    EnsureHost,
    Event,
    HostGone,
    HostReported,
    HostState,
    Journal,
    Leave,
    LoadRead,
    MemberLeft,
    MemberReported,
    MemberState,
    PublishView,
    SendOrder,
    Steering,
    Tick,
    Timing,
    WriteJournal,
)
from cluster.control.status import view_of
from cluster.control.steer import advance, lose_hosts, resume_moves, started, take_turn, welcome_hosts, with_targets
from cluster.control.trouble import WELL, Trouble
from experts.placement import ClusterView, ExpertKey, Placement
from experts.reports import HostOrder, HostReport, MemberKind, MemberReport, Peer

K = TypeVar("K")
V = TypeVar("V")

VERSIONS_PER_TERM = 10**9
"""Versions of one life of the controller stay below those of the next."""


def start(
    journal: Journal, hosts: Iterable[str], now: float, timing: Timing | None = None, steering: Steering | None = None
) -> tuple[ControllerState, list[Effect]]:
    """Begin a life of the controller. `journal` is what the last life left, or a fresh one with term 0.

    Hosts that live are waited for and adopted; on a fresh start all of them are started at once.
    """
    timing = timing or Timing()
    first_life = journal.term == 0
    moving = journal.moves or started(journal.target)
    journal = replace(journal, term=journal.term + 1, moves=moving)
    patience = 0.0 if first_life else timing.lost_after
    needed = {name for names in (*moving.goal.values(), *to_hold(moving).values()) for name in names}
    hosts = [*hosts, *journal.added]
    names = [name for name in hosts if name in needed or name not in journal.draining]
    next_host = max(journal.next_host, len(hosts))
    journal = replace(journal, away=journal.away & frozenset(names), next_host=next_host)
    nothing: frozenset[ExpertKey] = frozenset()
    host = HostState(target=nothing, duty=nothing, start_at=now + patience, heard_at=now)
    state = ControllerState(
        journal=journal,
        moving=moving,
        hosts=_frozen(dict.fromkeys(names, host)),
        ticked_at=now,
        alone_since=now,
        hold_until=now + patience,
        version=journal.term * VERSIONS_PER_TERM,
        timing=timing,
        steering=steering or Steering(),
    )
    return with_targets(state), [WriteJournal(journal=journal)]


def step(state: ControllerState, event: Event, now: float) -> tuple[ControllerState, list[Effect]]:
    """Take one event in. Effects are to be carried out in order. Raises InvalidInput for what a person asked in vain,
    and nothing has happened then."""
    effects: list[Effect] = []
    written = state.journal
    match event:
        case HostReported():
            state = _host_reported(state, event, now, effects)
        case HostGone():
            state = _host_gone(state, event)
        case MemberReported():
            state = _member_reported(state, event.report, now)
        case MemberLeft():
            state = _without_member(state, event.name)
        case DrainAsked():
            state = replace(state, draining=True)
        case Tick():
            state = _tick(state, now, effects)
        case LoadRead():
            # A plan would leave new hosts less than their share.
            state = welcome(state, now, effects)
            state = take_turn(state, event, now, effects)
            state = follow_use(state, event.load, now, effects)
        case _:
            state = ask(state, event, now, effects)
    state = _publish(state, written, now, effects)
    # Whoever gives something up does so after everybody was told not to ask for it any more.
    return _send_orders(_release(state, effects), effects), effects


def _host_reported(state: ControllerState, event: HostReported, now: float, effects: list[Effect]) -> ControllerState:
    report = event.report
    host = state.hosts.get(report.name)
    if host is None or _is_older_life(host, event):
        # Two processes must never answer to one name.
        retire = HostOrder(retire=True)
        effects.append(SendOrder(name=report.name, stream=event.stream, order=retire))
        return state
    serving = _serving(host, report)
    ordered = host.ordered if host.stream == event.stream else None
    first = host.report is None
    same_life = host.report is not None and host.report.incarnation == report.incarnation
    host = replace(
        host,
        report=report,
        heard_at=now,
        stream=event.stream,
        ordered=ordered,
        lost=False,
        serving=serving,
        trouble=host.trouble if same_life else Trouble(),
    )
    state = _with_host(state, report.name, host)
    return advance(_look_after_hosts(_spread(state) if first else state, now, effects), now, effects)


def _spread(state: ControllerState) -> ControllerState:
    """Before a new cluster serves anything, its replicas are spread over the nodes that its hosts turn out to be on."""
    reports = {name: host.report for name, host in state.hosts.items()}
    journal = state.journal
    if journal.term > 1 or journal.epoch > 0 or not all(reports.values()):
        return state
    target = spread(journal.target, {name: report.node for name, report in reports.items() if report is not None})
    if target == journal.target:
        return state
    target, moving = _frozen(target), started(_frozen(target))
    return with_targets(replace(state, journal=replace(journal, target=target, moves=moving), moving=moving))


def _is_older_life(host: HostState, event: HostReported) -> bool:
    """A later life of the same host is connected. (When it is not, a clock that was set back explains as much.)"""
    if host.report is None or host.stream in (None, event.stream):
        return False
    return event.report.incarnation < host.report.incarnation


def _serving(host: HostState, report: HostReport) -> frozenset[ExpertKey]:
    """Of a host that is still loading only what served before, so that a long load makes one epoch, not hundreds;
    of one that has loaded all it can, everything."""
    held = report.held & host.target
    settled = held == host.target or bool(report.problem)
    same_life = host.report is not None and host.report.incarnation == report.incarnation
    serving = held if settled else host.serving & held if same_life else frozenset()
    return host.serving if serving == host.serving else serving


def _host_gone(state: ControllerState, event: HostGone) -> ControllerState:
    """A broken stream alone takes nothing away: the host may be back within `lost_after`."""
    host = state.hosts.get(event.name)
    if host is None or host.stream != event.stream:
        return state
    return _with_host(state, event.name, replace(host, stream=None))


def _member_reported(state: ControllerState, report: MemberReport, now: float) -> ControllerState:
    members = dict(state.members)
    members[report.name] = MemberState(report=report, heard_at=now)
    state = replace(state, members=_frozen(members), had_members=True)
    state = _hear_of_hosts(state, report, now)
    if report.view_version <= state.version:
        return state
    # It has a view from a life that left no journal here: go on above its numbers.
    epoch = max(state.journal.epoch, report.view_epoch + 1)
    return replace(state, version=report.view_version, journal=replace(state.journal, epoch=epoch), view=None)


def _hear_of_hosts(state: ControllerState, report: MemberReport, now: float) -> ControllerState:
    """A router says which hosts it can use; what the others said last counts with it."""
    reports = [member.report for member in state.members.values() if member.report.kind is MemberKind.ROUTER]
    for name, host in state.hosts.items():
        if name not in report.hosts or (report.hosts[name] == WELL and host.trouble.since is None):
            continue
        trouble = host.trouble.hear((one.hosts[name] for one in reports if name in one.hosts), now)
        state = _with_host(state, name, host if trouble == host.trouble else replace(host, trouble=trouble))
    return state


def _without_member(state: ControllerState, name: str) -> ControllerState:
    return replace(state, members=_frozen({key: member for key, member in state.members.items() if key != name}))


def _tick(state: ControllerState, now: float, effects: list[Effect]) -> ControllerState:
    pause = now - state.ticked_at
    state = replace(state, ticked_at=now)
    if pause > state.timing.stall:
        state = _forgive(state, pause)
    for name, host in state.hosts.items():
        state = _with_host(state, name, _check_host(name, host, state.timing, now, effects))
    state = advance(_look_after_hosts(state, now, effects), now, effects)
    for name, member in state.members.items():
        if now - member.heard_at >= state.timing.lost_after:
            state = _without_member(state, name)
    if state.members:
        return replace(state, alone_since=now)
    patience = state.timing.alone if state.had_members else state.timing.alone_at_start
    if now - state.alone_since >= patience:
        effects.append(Leave(reason=f"no router and no ingress for {patience:.0f} s"))
        return replace(state, alone_since=now)
    return state


def _look_after_hosts(state: ControllerState, now: float, effects: list[Effect]) -> ControllerState:
    """Give the experts of hosts that stay away to others, and back once they are there again."""
    unheard = any(host.report is None for name, host in state.hosts.items() if name not in state.journal.away)
    if now < state.hold_until and unheard:
        return state
    if not state.is_resumed:
        state = resume_moves(state, now)
    away = state.journal.away
    gone = {name for name, host in state.hosts.items() if name not in away and _stays_away(host, now, state)}
    back = {name for name in away if _is_there(state.hosts[name])}
    if back:
        state = welcome_hosts(state, back, now, effects)
    if gone and len((away | gone) - back) < len(state.hosts):
        state = lose_hosts(state, gone, now, effects)
    return state


def _is_there(host: HostState) -> bool:
    """One that has no address only tells why it could not begin."""
    return host.report is not None and bool(host.report.address) and not host.lost


def _stays_away(host: HostState, now: float, state: ControllerState) -> bool:
    new = host.report is None and state.journal.term == 1
    patience = state.timing.rehome_at_start if new else state.timing.rehome
    return (host.report is None or host.lost) and now - host.heard_at >= patience


def _forgive(state: ControllerState, pause: float) -> ControllerState:
    """The controller itself was stopped: missing reports of that time say nothing about anybody."""
    hosts = {
        name: replace(host, heard_at=host.heard_at + pause, start_at=host.start_at + pause)
        for name, host in state.hosts.items()
    }
    members = {name: replace(member, heard_at=member.heard_at + pause) for name, member in state.members.items()}
    return replace(
        state,
        hosts=_frozen(hosts),
        members=_frozen(members),
        alone_since=state.alone_since + pause,
        hold_until=state.hold_until + pause,
    )


def _check_host(name: str, host: HostState, timing: Timing, now: float, effects: list[Effect]) -> HostState:
    alive = host.report is not None and not host.lost
    if alive and now - host.heard_at >= timing.lost_after:
        return replace(host, lost=True, serving=frozenset(), start_at=now + timing.restart_lost)
    if alive or now < host.start_at:
        return host
    effects.append(EnsureHost(name=name))
    return replace(host, start_at=now + timing.ensure_again)


def _publish(state: ControllerState, written: Journal, now: float, effects: list[Effect]) -> ControllerState:
    """Publish a view when anything that members act upon differs from the last one. `written` is the journal that is
    durable already."""
    complete = all(host.duty <= host.serving for host in state.hosts.values())
    view: ClusterView | None = None
    if now >= state.hold_until or complete:
        before, after = state.journal.replicas, _serving_replicas(state)
        due = complete or _takes_away(before, after) or now - state.published_at >= state.timing.batch
        if after != before and due:
            journal = replace(state.journal, epoch=state.journal.epoch + 1, replicas=after)
            state = replace(state, journal=journal, published_at=now)
        view = view_of(state, version=state.version + 1)
    if state.journal is not written:
        effects.append(WriteJournal(journal=state.journal))
    if view is None or (state.view is not None and _what_matters(view) == _what_matters(state.view)):
        return state
    effects.append(PublishView(view=view))
    return replace(state, view=view, version=view.version)


def _release(state: ControllerState, effects: list[Effect]) -> ControllerState:
    """A host that was drained, and is empty, is no part of the cluster any more."""
    goal = state.moving.goal
    for name in sorted(state.journal.draining & state.hosts.keys()):
        host = state.hosts[name]
        if host.target or any(name in names for names in goal.values()):
            continue
        journal = state.journal
        state = without_host(state, name)
        if state.journal is not journal:
            effects.append(WriteJournal(journal=state.journal))
        if host.stream is not None:
            effects.append(SendOrder(name=name, stream=host.stream, order=HostOrder(retire=True)))
        else:
            effects.append(EndHost(name=name))
    return state


def _send_orders(state: ControllerState, effects: list[Effect]) -> ControllerState:
    for name, host in state.hosts.items():
        if host.stream is None or name in state.journal.away:
            continue
        peers = _peers(state, name)
        if host.ordered is None or host.ordered.target != host.target or (peers and peers != host.ordered.peers):
            state = replace(state, num_orders=state.num_orders + 1)
            order = HostOrder(
                target=host.target,
                peers=_frozen(peers),
                bytes_per_s=state.steering.limits.bytes_per_s,
                # Unlike any of another life.
                number=state.journal.term * VERSIONS_PER_TERM + state.num_orders,
            )
            effects.append(SendOrder(name=name, stream=host.stream, order=order))
            state = _with_host(state, name, replace(host, ordered=order))
    return state


def _peers(state: ControllerState, name: str) -> dict[ExpertKey, Peer]:
    """Where host `name` gets what it shall load; what is not in it comes from disk."""
    peers = {}
    for (key, to), loading in state.moving.loading.items():
        source = state.hosts.get(loading.source)
        if to == name and source is not None and source.report is not None and not source.lost:
            peers[key] = Peer(name=loading.source, address=source.report.address)
    return peers


def _serving_replicas(state: ControllerState) -> Replicas:
    serving = {name: host.serving for name, host in state.hosts.items()}
    replicas = {
        key: tuple(name for name in names if key in serving.get(name, ()))
        for key, names in state.moving.published.items()
    }
    return _frozen({key: names for key, names in replicas.items() if names})


def _takes_away(before: Replicas, after: Replicas) -> bool:
    return any(not set(names) <= set(after.get(key, ())) for key, names in before.items())


def _what_matters(view: ClusterView) -> tuple[Placement, object, object, bool]:
    """A view without the numbers that change every second."""
    hosts = {name: (host.incarnation, host.address, host.state, host.cost) for name, host in view.hosts.items()}
    routers = {name: (router.address, router.pid, router.state) for name, router in view.routers.items()}
    return view.placement, hosts, routers, view.draining


def _with_host(state: ControllerState, name: str, host: HostState) -> ControllerState:
    if state.hosts[name] is host:
        return state
    return replace(state, hosts=_frozen({**state.hosts, name: host}))


def _frozen(mapping: Mapping[K, V]) -> Mapping[K, V]:
    return MappingProxyType(mapping)
