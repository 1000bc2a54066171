"""How many hosts there should be: from how busy they are and how long requests wait, both sustained."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cluster.control.fleet import Fleet, Load
from cluster.control.trust import doubt_use
from experts.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Bounds and patience. Hosts are added until they are busy for `target` of the time, once they were for `high` or
    requests waited `queue_s` for `up_after_s`; one is drained when the rest stays below `target` for `down_after_s`."""

    min_hosts: int = 1
    max_hosts: int = 10**6
    target: float = 0.6
    high: float = 0.8
    queue_s: float = 2.0
    up_after_s: float = 30.0
    down_after_s: float = 600.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_hosts <= self.max_hosts:
            raise InvalidInput("min_hosts", self.min_hosts, f"must be between 1 and max_hosts, {self.max_hosts}")
        if not 0.0 < self.target < self.high:
            raise InvalidInput("target", self.target, f"must be above 0 and below high, {self.high}")


@dataclass(frozen=True, kw_only=True)
class ScaleState:
    """Since when it is too busy or too idle without a break; None where it is not."""

    busy_since: float | None = None
    idle_since: float | None = None


@dataclass(frozen=True, kw_only=True)
class Size:
    """`hosts` are wanted; `drain` are to be emptied, `release` are empty and may go. `why` tells it in words."""

    hosts: int
    why: str
    drain: tuple[str, ...] = ()
    release: tuple[str, ...] = ()


def size(
    load: Load,
    fleet: Fleet,
    held: dict[str, int],
    replicas_needed: int,
    scaling: Scaling,
    state: ScaleState,
    now: float,
) -> tuple[Size, ScaleState]:
    """`held[host]` are the experts on each host, `replicas_needed` those that must find room on fewer hosts."""
    present = len(fleet.staying)
    if present < scaling.min_hosts:
        why = f"{present} hosts are fewer than the {scaling.min_hosts} that there shall be"
        return Size(hosts=scaling.min_hosts, why=why), ScaleState()
    release = tuple(name for name, host in fleet.hosts.items() if host.draining and not held.get(name))
    doubt = doubt_use(load, fleet)
    if doubt or not present:
        return Size(hosts=present, why=f"hosts stay: {doubt or 'there are none'}", release=release), ScaleState()
    busy = sum(load.busy[name] for name in fleet.staying) / present
    wait = load.queue_s or 0.0
    state = replace(
        state,
        busy_since=_since(state.busy_since, _is_busy(busy, wait, scaling), now),
        idle_since=_since(state.idle_since, _is_idle(busy, wait, present, scaling), now),
    )
    told = f"{present} hosts are busy for {busy:.0%} of the time, requests wait {wait:.1f} s"
    if state.busy_since is not None and now - state.busy_since >= scaling.up_after_s:
        needed = max(present + 1, math.ceil(present * busy / scaling.target))
        wanted = min(needed, scaling.max_hosts)
        return Size(hosts=max(wanted, present), why=_told_more(told, wanted, present), release=release), state
    if state.idle_since is not None and now - state.idle_since >= scaling.down_after_s:
        return _one_less(told, fleet, held, replicas_needed, scaling, release), state
    return Size(hosts=present, why=told, release=release), state


def _since(since: float | None, holds: bool, now: float) -> float | None:
    return (now if since is None else since) if holds else None


def _is_busy(busy: float, wait: float, scaling: Scaling) -> bool:
    # Where hosts are idle and requests wait, it is not hosts that are wanting.
    return busy >= scaling.high or (wait >= scaling.queue_s and busy >= scaling.target / 2)


def _is_idle(busy: float, wait: float, present: int, scaling: Scaling) -> bool:
    if present <= scaling.min_hosts or wait >= scaling.queue_s / 2:
        return False
    return busy * present / (present - 1) <= 0.9 * scaling.target


def _told_more(told: str, wanted: int, present: int) -> str:
    return f"{told}: {wanted} wanted" if wanted > present else f"{told}: more would be wanted, but that is the most"


def _one_less(
    told: str, fleet: Fleet, held: dict[str, int], replicas_needed: int, scaling: Scaling, release: tuple[str, ...]
) -> Size:
    staying = fleet.staying
    if len(staying) < len(fleet.hosts):
        return Size(hosts=len(staying), why=f"{told}: one is being drained already", release=release)
    room = sum(fleet.hosts[name].slots for name in staying)
    fitting = [name for name in staying if room - fleet.hosts[name].slots >= replicas_needed]
    if not fitting:
        return Size(hosts=len(staying), why=f"{told}: idle, but the others have no room for all experts")
    leaver = min(fitting, key=lambda name: (held.get(name, 0), -staying.index(name)))
    return Size(hosts=len(staying) - 1, why=f"{told}: {leaver} is to be drained", drain=(leaver,), release=release)
