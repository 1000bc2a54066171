"""The processes below this one, from /proc: to see that parts are alive, and to end what is left of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
KILL_TIMEOUT_S = 5.0
_PR_SET_CHILD_SUBREAPER = 36


def descendants(pid: int) -> list[int]:
    """Children of `pid`, their children and so on; empty where there is no /proc."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for child, parent, state in _processes():
        if state != "Z":
            children[parent].append(child)
    found, queue = [], [pid]
    while queue:
        below = children[queue.pop()]
        found += below
        queue += below
    return found


def is_alive(pid: int) -> bool:
    """Whether `pid` runs; one that has ended and waits for its parent to notice does not."""
    stat = _stat(pid)
    return stat is not None and stat[1] != "Z"


def adopt_orphans() -> None:
    """From now on a process below this one stays below it when its parent dies, instead of going to init.

    Without Linux nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(pid: int, patience_s: float) -> None:
    """See everything below `pid` gone: what has not ended by itself within `patience_s` is killed."""
    end = time.monotonic() + patience_s
    while (left := descendants(pid)) and time.monotonic() < end:
        time.sleep(0.05)
    for below in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(below, signal.SIGKILL)
    end = time.monotonic() + KILL_TIMEOUT_S
    while any(is_alive(below) for below in left) and time.monotonic() < end:
        time.sleep(0.05)


def command(pid: int) -> str:
    """The program that `pid` runs, without its arguments; "" when it is gone."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        return ""


def _processes() -> Iterator[tuple[int, int, str]]:
    if not PROC.is_dir():
        return
    for entry in PROC.iterdir():
        stat = _stat(int(entry.name)) if entry.name.isdigit() else None
        if stat is not None:
            yield int(entry.name), stat[0], stat[1]


def _stat(pid: int) -> tuple[int, str] | None:
    """Parent and state. The name before them is in brackets and may itself hold brackets and blanks."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return int(parent), state
