"""CPU time of a local cluster's parts, from /proc: what serving costs beside the engine. Linux only."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.processes import PROC, descendants
from experts.reports import ClusterStatus

ENGINE_THREAD = "engine"
"""What the operating system calls a router's engine thread. Threads that it starts for torch inherit the name."""
INGRESS, AROUND_ENGINE = "ingress", "router without engine"
OUTSIDE_ENGINE = (INGRESS, AROUND_ENGINE)


@dataclass(frozen=True, kw_only=True)
class CpuUse:
    """Seconds of user and system time that a part of a cluster used."""

    part: str
    cpu_s: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """Threads of the cluster that are counted together: whole processes, or the named threads of one or all others."""

    name: str
    pids: tuple[int, ...]
    threads: str = ""
    """Only threads of this name; with a leading "-": all but those."""


def name_threads(threads: Iterable[threading.Thread]) -> None:
    """Let the operating system know threads of this process by their Python names."""
    for thread in threads:
        with suppress(OSError):
            (PROC / "self/task" / str(thread.native_id) / "comm").write_text(thread.name[:15])


def parts_of(status: ClusterStatus) -> tuple[Part, ...]:
    """The parts of a cluster on this machine."""
    ingresses = [ingress.pid for ingress in status.ingresses]
    routers = tuple(router.pid for router in status.routers)
    decoders = tuple(child for pid in ingresses for child in descendants(pid))
    parts = (
        Part(name=INGRESS, pids=(*ingresses, *decoders)),
        Part(name=AROUND_ENGINE, pids=routers, threads=f"-{ENGINE_THREAD}"),
        Part(name="router's engine", pids=routers, threads=ENGINE_THREAD),
        Part(name="expert hosts", pids=tuple(host.pid for host in status.hosts if host.pid not in routers)),
    )
    return tuple(part for part in parts if part.pids)


def cpu_seconds(parts: Iterable[Part]) -> dict[str, float]:
    """What each part has used since its start. Processes that are gone count for nothing."""
    return {part.name: sum(_used(pid, part.threads) for pid in part.pids) for part in parts}


def used_between(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[CpuUse, ...]:
    """The difference of two `cpu_seconds`; a part whose process was replaced in between is left out."""
    return tuple(
        CpuUse(part=name, cpu_s=after[name] - before[name]) for name in before if after.get(name, -1.0) >= before[name]
    )


def outside_engine(uses: Iterable[CpuUse]) -> float | None:
    """Seconds of all that only carries requests and answers, None if any of it is unknown."""
    known = {use.part: use.cpu_s for use in uses}
    return sum(known[part] for part in OUTSIDE_ENGINE) if all(part in known for part in OUTSIDE_ENGINE) else None


def _used(pid: int, threads: str) -> float:
    """A process's total holds its ended threads too, so that "all but" is the total without the named ones."""
    if not threads:
        return _stat_seconds(PROC / str(pid))
    named = _named_threads(pid, threads.removeprefix("-"))
    return _stat_seconds(PROC / str(pid)) - named if threads.startswith("-") else named


def _named_threads(pid: int, name: str) -> float:
    with suppress(OSError):
        tasks = list((PROC / str(pid) / "task").iterdir())
        return sum(_stat_seconds(task) for task in tasks if _comm(task) == name)
    return 0.0


def _comm(task: Path) -> str:
    try:
        return (task / "comm").read_text().rstrip("\n")
    except OSError:
        return ""


def _stat_seconds(folder: Path) -> float:
    """User and system time. The name before them is in brackets and may itself hold brackets and blanks."""
    try:
        values = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
