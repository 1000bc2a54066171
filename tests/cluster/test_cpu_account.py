"""Whose processor time is whose, by process and by thread, seen on processes of our own."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from cluster.cpu_account import (
    OUTSIDE_ENGINE,
    CpuUse,
    Part,
    cpu_seconds,
    name_threads,
    outside_engine,
    parts_of,
    used_between,
)
from experts.placement import HostInfo, IngressInfo, RouterInfo
from experts.reports import ClusterStatus, ControllerInfo

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")

ME = os.getpid()


def burn(cpu_s: float) -> None:
    end = time.thread_time() + cpu_s
    while time.thread_time() < end:
        pass


def test_a_named_thread_s_time_is_told_from_the_rest() -> None:
    parts = (
        Part(name="all", pids=(ME,)),
        Part(name="named", pids=(ME,), threads="burner"),
        Part(name="rest", pids=(ME,), threads="-burner"),
    )
    go, burnt, stop = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        go.wait()
        burn(0.3)
        burnt.set()
        stop.wait()

    thread = threading.Thread(target=work, name="burner")
    thread.start()
    name_threads([thread])
    before = cpu_seconds(parts)
    go.set()
    burnt.wait()
    burn(0.1)
    after = cpu_seconds(parts)
    stop.set()
    thread.join()
    used = {use.part: use.cpu_s for use in used_between(before, after)}
    # Counters advance by hundredths of a second, each read at another instant.
    assert used["named"] == pytest.approx(0.3, abs=0.05)
    assert used["rest"] >= 0.05
    assert used["all"] == pytest.approx(used["named"] + used["rest"], abs=0.05)


def test_processes_that_are_gone_count_for_nothing() -> None:
    gone = Part(name="gone", pids=(2**22 + 5,))
    assert cpu_seconds([gone]) == {"gone": 0.0}
    assert used_between({"gone": 3.0, "stays": 1.0}, {"gone": 0.0, "stays": 1.5})[0].part == "stays"
    assert len(used_between({"gone": 3.0}, {"gone": 0.0})) == 0


def test_outside_the_engine_is_known_only_when_all_of_it_is() -> None:
    uses = [CpuUse(part=part, cpu_s=cpu_s) for part, cpu_s in zip(OUTSIDE_ENGINE, (1.0, 2.0), strict=True)]
    assert outside_engine([*uses, CpuUse(part="expert hosts", cpu_s=50.0)]) == 3.0
    assert outside_engine(uses[1:]) is None


def test_a_cluster_s_parts() -> None:
    status = ClusterStatus(
        name="herd",
        controller=ControllerInfo(pid=11, address="127.0.0.1:7300", node="127.0.0.1", epoch=4),
        ingresses=(IngressInfo(name="ingress-a", pid=12, http="http://127.0.0.1:1"),),
        routers=(RouterInfo(name="router-a", address="127.0.0.1:7200", pid=13),),
        hosts=(
            HostInfo(name="host-0", incarnation=1, address="127.0.0.1:7100", pid=14, state="ready"),
            HostInfo(name="router-a-local", incarnation=1, address="", pid=13, state="ready"),
        ),
    )
    parts = {part.name: part for part in parts_of(status)}
    assert parts["expert hosts"].pids == (14,)
    assert parts["router's engine"].pids == parts["router without engine"].pids == (13,)
    assert parts["router's engine"].threads == parts["router without engine"].threads[1:] == "engine"
