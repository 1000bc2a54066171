"""What a drill breaks, and how it is mended: signals to processes of a cluster on this machine."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.processes import is_alive
from experts.errors import InvalidInput
from experts.reports import ClusterStatus

HANG_S = 4.0
SLOW_S = 6.0
SLOW_FACTOR = 100
SLICE_S = 0.1
"""A slowed process runs for 1 / SLOW_FACTOR of each such slice."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Kind(StrEnum):
    """The drills. A host or router that hangs or is slow is itself again after some seconds."""

    KILL_HOST = "kill-host"
    HANG_HOST = "hang-host"
    SLOW_HOST = "slow-host"
    PARTITION = "partition"
    KILL_REPLICAS = "kill-replicas"
    KILL_ROUTER = "kill-router"
    HANG_ROUTER = "hang-router"
    KILL_CONTROLLER = "kill-controller"
    KILL_INGRESS = "kill-ingress"


@dataclass(frozen=True, kw_only=True)
class Injection:
    """A fault that was done: to which parts, and how it is undone. `hosts` are those that routers must notice."""

    victims: tuple[str, ...]
    hosts: tuple[str, ...] = ()
    undo: Callable[[], None] = lambda: None
    lasts_s: float = 0.0


def inject(kind: Kind, status: ClusterStatus, cut: Callable[[str, float], None], draw: random.Random) -> Injection:
    """Do it, to a part drawn by `draw`. `cut` (host, seconds) takes a host's rows off the network.

    Raises InvalidInput where the cluster has no such part on this machine.
    """
    match kind:
        case Kind.KILL_HOST:
            return _kill_hosts([_pick(_hosts(status), "hosts", draw)])
        case Kind.KILL_REPLICAS:
            return _kill_hosts(_holders(status, draw))
        case Kind.HANG_HOST:
            name, pid = _pick(_hosts(status), "hosts", draw)
            return _hang(name, pid, hosts=(name,))
        case Kind.SLOW_HOST:
            return _slow(*_pick(_hosts(status), "hosts", draw))
        case Kind.PARTITION:
            name, _ = _pick(_hosts(status), "hosts", draw)
            cut(name, HANG_S)
            return Injection(victims=(name,), hosts=(name,), lasts_s=HANG_S)
        case Kind.KILL_ROUTER:
            return _kill(*_pick([(one.name, one.pid) for one in status.routers], "routers", draw))
        case Kind.HANG_ROUTER:
            return _hang(*_pick([(one.name, one.pid) for one in status.routers], "routers", draw))
        case Kind.KILL_CONTROLLER:
            return _kill("controller", status.controller.pid)
        case Kind.KILL_INGRESS:
            return _kill(*_pick([(one.name, one.pid) for one in status.ingresses], "ingresses", draw))


def check_is_here(status: ClusterStatus) -> None:
    """Signals reach processes of this machine only. Raises InvalidInput."""
    parts = [("host", host.name, host.pid) for host in status.hosts] + [
        ("router", router.name, router.pid) for router in status.routers
    ]
    for kind, name, pid in parts:
        if not pid or not is_alive(pid):
            raise InvalidInput(kind, name, "must run on this machine: drills reach processes by signals")


def _hosts(status: ClusterStatus) -> list[tuple[str, int]]:
    return [(host.name, host.pid) for host in status.hosts if host.transport == "grpc"]


def _holders(status: ClusterStatus, draw: random.Random) -> list[tuple[str, int]]:
    """One host and half of the others: with two replicas, together all that hold some expert.

    With more replicas one may be left; a status does not tell where each expert is.
    """
    hosts = _hosts(status)
    first = _pick(hosts, "hosts", draw)
    others = [host for host in hosts if host != first]
    draw.shuffle(others)
    # Placements spread the replicas of one host over all others, so that any second host shares experts with it.
    return [first, *others[: max(1, len(others) // 2)]] if others else [first]


def _pick(parts: Sequence[tuple[str, int]], what: str, draw: random.Random) -> tuple[str, int]:
    if not parts:
        raise InvalidInput("drill", what, "the cluster has none")
    return draw.choice(sorted(parts))


def _kill_hosts(hosts: Sequence[tuple[str, int]]) -> Injection:
    for _, pid in hosts:
        os.kill(pid, signal.SIGKILL)
    names = tuple(name for name, _ in hosts)
    return Injection(victims=names, hosts=names)


def _kill(name: str, pid: int) -> Injection:
    os.kill(pid, signal.SIGKILL)
    return Injection(victims=(name,))


def _hang(name: str, pid: int, hosts: tuple[str, ...] = ()) -> Injection:
    os.kill(pid, signal.SIGSTOP)
    return Injection(victims=(name,), hosts=hosts, undo=lambda: _continue(pid), lasts_s=HANG_S)


def _slow(name: str, pid: int) -> Injection:
    """The process runs only for a hundredth of the time."""
    ended = threading.Event()

    def throttle() -> None:
        while not ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                ended.wait(SLICE_S * (1 - 1 / SLOW_FACTOR))
                os.kill(pid, signal.SIGCONT)
                ended.wait(SLICE_S / SLOW_FACTOR)
        _continue(pid)

    thread = threading.Thread(target=throttle, name="throttle", daemon=True)
    thread.start()

    def undo() -> None:
        ended.set()
        thread.join()

    return Injection(victims=(name,), hosts=(name,), undo=undo, lasts_s=SLOW_S)


def _continue(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
