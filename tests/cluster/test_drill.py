"""What a drill concludes from what its clients saw, and what it does to processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.drill.command import parse_kinds
from cluster.drill.faults import Kind, check_is_here, inject
from cluster.drill.notice import noticed_in
from cluster.drill.table import lines_of
from cluster.drill.verdict import BUDGETS, Fault, Told, judge, quantile
from cluster.processes import is_alive
from experts.errors import InvalidInput
from experts.placement import HostInfo, IngressInfo, RouterInfo
from experts.reports import ClusterStatus, ControllerInfo


def told(sent: float, times: Sequence[float], **more: Any) -> Told:
    return Told(prompt=0, sent=sent, times=tuple(times), ended=more.pop("ended", times[-1] if times else sent), **more)


def ticking(begin: float, end: float, every: float = 0.1) -> list[float]:
    return [begin + every * step for step in range(1, round((end - begin) / every) + 1)]


def fault(kind: Kind, at: float, noticed: dict[str, float | None] | None = None, lasts: float = 0.0) -> Fault:
    return Fault(kind=kind, victims=("v",), at=at, undone=at + lasts, end=at + 10.0, noticed=noticed or {})


def test_a_pause_of_streams_that_a_fault_met_is_its_stall_less_what_is_usual() -> None:
    streams = [
        told(0.0, [*ticking(0.0, 5.0), *ticking(5.4, 9.0)]),
        told(0.0, ticking(0.0, 9.0)),
        told(0.0, ticking(0.0, 3.0)),
    ]
    verdict = judge(Kind.KILL_HOST, streams, [fault(Kind.KILL_HOST, 5.05, {"v": 5.07})], 0.0, 4)
    assert verdict.usual_gap_p99_s == pytest.approx(0.1)
    assert verdict.stall_max_s == verdict.stall_p99_s == pytest.approx(0.4)
    assert verdict.stall_p50_s == pytest.approx(0.0)
    assert verdict.detection_max_s == pytest.approx(0.02)
    assert [sentence.split(":")[0] for sentence in verdict.broken] == ["stall p99", "throughput"]


def test_budgets_are_kept_when_nothing_is_to_be_seen() -> None:
    streams = [told(0.0, ticking(0.0, 30.0)) for _ in range(3)]
    for kind in Kind:
        one = judge(kind, streams, [fault(kind, 10.0, {"v": 10.01} if "host" in kind else None)], 0.0, 4)
        assert one.broken == (), kind
        assert (one.requests, one.failed, one.equal, one.compared) == (3, 0, 3, 3)
        assert "kept" in next(iter(lines_of(one)))


def test_failures_and_other_answers_break_every_budget() -> None:
    streams = [
        told(0.0, ticking(0.0, 30.0)),
        told(0.0, ticking(0.0, 5.0), problem="http_500: no", kind="http_500"),
        told(0.0, ticking(0.0, 30.0), equal=False),
    ]
    for kind in Kind:
        verdict = judge(kind, streams, [fault(kind, 10.0)], 0.0, 4)
        assert verdict.failed == 1 and verdict.equal == 1 and verdict.compared == 2
        assert len(verdict.broken) >= 2
        assert verdict.problems == ("http_500: no",)


def test_streams_may_be_cut_off_by_the_death_of_their_ingress_alone() -> None:
    streams = [told(0.0, ticking(0.0, 30.0)), told(0.0, ticking(0.0, 5.0), problem="cut_off: x", kind="cut_off")]
    of = {kind: judge(kind, streams, [fault(kind, 5.0)], 0.0, 4) for kind in Kind}
    assert {kind for kind, verdict in of.items() if verdict.failed == 0} == {Kind.KILL_INGRESS}
    assert of[Kind.KILL_INGRESS].cut_off == 1


def test_new_requests_wait_no_longer_than_usual() -> None:
    usual = [told(at, [at + 0.2, at + 0.3]) for at in range(5)]
    late = told(5.5, [7.9, 8.0])
    verdict = judge(Kind.KILL_INGRESS, [*usual, late], [fault(Kind.KILL_INGRESS, 5.0)], 0.0, 4)
    assert verdict.new_request_max_s == pytest.approx(2.4 - 0.2)
    assert any("new requests" in sentence for sentence in verdict.broken)


def test_a_slow_host_is_routed_around_when_silences_end() -> None:
    calm = ticking(0.0, 5.0)
    streams = [told(0.0, [*calm, 6.0, 6.9, *ticking(6.9, 15.0)]), told(0.0, ticking(0.0, 15.0))]
    quick = judge(Kind.SLOW_HOST, streams, [fault(Kind.SLOW_HOST, 5.0, lasts=6.0)], 0.0, 4)
    assert quick.routed_around_s == pytest.approx(1.9 - 0.1)
    assert not quick.broken
    streams = [told(0.0, [*calm, 6.0, 7.0, 8.0, 9.0, *ticking(9.0, 15.0)])]
    slow = judge(Kind.SLOW_HOST, streams, [fault(Kind.SLOW_HOST, 5.0, lasts=6.0)], 0.0, 4)
    assert slow.routed_around_s == pytest.approx(4.0 - 0.1)
    assert slow.broken


def test_a_host_that_nobody_noticed_was_not_detected() -> None:
    streams = [told(0.0, ticking(0.0, 30.0))]
    verdict = judge(Kind.KILL_HOST, streams, [fault(Kind.KILL_HOST, 10.0, {"v": None})], 0.0, 4)
    assert verdict.undetected == 1 and verdict.detection_max_s is None
    assert len(verdict.broken) == 1


def test_quantiles_are_values_that_were_seen() -> None:
    assert quantile([], 0.5) == 0.0
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([float(n) for n in range(1, 101)], 0.99) == 99.0


def test_every_drill_has_a_budget_and_a_name() -> None:
    assert set(BUDGETS) == set(Kind)
    assert parse_kinds("all") == list(Kind)
    assert parse_kinds("kill-host, hang-router") == [Kind.KILL_HOST, Kind.HANG_ROUTER]
    with pytest.raises(InvalidInput) as caught:
        parse_kinds("kill-host,unplug")
    assert (caught.value.field, caught.value.value) == ("drill", "unplug")


def test_routers_metrics_tell_when_a_host_was_noticed() -> None:
    def page(*lines: tuple[str, str, float]) -> str:
        name = "herd_router_host_state_entered_timestamp_seconds"
        return "\n".join(f'{name}{{host="{host}",state="{state}"}} {at!r}' for host, state, at in lines)

    first = page(("h0", "dead", 100.02), ("h0", "well", 90.0), ("h1", "dead", 100.5))
    second = page(("h0", "suspect", 100.04), ("h0", "dead", 100.3))
    assert noticed_in([first, second], "h0", 100.0) == 100.04
    assert noticed_in([first, ""], "h0", 100.0) == 100.02
    assert noticed_in([first, second], "h0", 101.0) is None
    assert noticed_in([first, second], "h2", 0.0) is None
    # Of two looks at the same routers, the later one does not know of the first time any more.
    again = first.replace("100.02", "105.5")
    assert noticed_in([first + again, second], "h0", 100.0) == 100.04


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child
        child.kill()


def status(pid: int) -> ClusterStatus:
    return ClusterStatus(
        name="herd",
        controller=ControllerInfo(pid=pid, address="127.0.0.1:1", node="127.0.0.1", epoch=1),
        ingresses=(IngressInfo(name="i", pid=pid, http="http://127.0.0.1:1"),),
        routers=(RouterInfo(name="r", address="127.0.0.1:2", pid=pid),),
        hosts=(HostInfo(name="h", incarnation=1, address="127.0.0.1:3", pid=pid, slots_target=4),),
    )


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind.value.startswith("kill")])
def test_what_is_killed_is_dead(kind: Kind, sleeper: subprocess.Popen[bytes]) -> None:
    injection = inject(kind, status(sleeper.pid), lambda host, seconds: None, random.Random(0))
    assert sleeper.wait(30) == -signal.SIGKILL
    injection.undo()
    assert injection.victims


@pytest.mark.parametrize("kind", [Kind.HANG_HOST, Kind.HANG_ROUTER, Kind.SLOW_HOST])
def test_what_hangs_goes_on_when_it_is_undone(kind: Kind, sleeper: subprocess.Popen[bytes]) -> None:
    injection = inject(kind, status(sleeper.pid), lambda host, seconds: None, random.Random(0))
    while state_of(sleeper.pid) != "T":
        pass
    injection.undo()
    while state_of(sleeper.pid) == "T":
        pass
    assert is_alive(sleeper.pid) and injection.lasts_s > 0


def test_a_cut_is_asked_of_whoever_can_make_it(sleeper: subprocess.Popen[bytes]) -> None:
    cuts: list[tuple[str, float]] = []
    injection = inject(Kind.PARTITION, status(sleeper.pid), lambda *cut: cuts.append(cut), random.Random(0))
    assert cuts == [("h", injection.lasts_s)] and injection.hosts == ("h",)


def test_parts_that_are_elsewhere_cannot_be_drilled() -> None:
    check_is_here(status(os.getpid()))
    with pytest.raises(InvalidInput, match="this machine"):
        check_is_here(status(2**22 + 5))
    with pytest.raises(InvalidInput, match="has none"):
        nobody = ClusterStatus(name="x", controller=status(1).controller)
        inject(Kind.KILL_ROUTER, nobody, lambda host, seconds: None, random.Random(0))
