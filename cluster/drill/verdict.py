"""What users saw of a fault, from the instants of their tokens. Pure: numbers in, a verdict out.

Times are seconds of one clock; a fault happens at `fault`, its drill is over at `end`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.drill.faults import Kind


@dataclass(frozen=True, kw_only=True)
class Told:
    """One request as its client saw it: which prompt, when sent, when each piece of text came, when it was over.

    `problem` is empty for a whole answer. `equal`: its text is that of the same prompt without faults.
    """

    prompt: int
    sent: float
    times: tuple[float, ...]
    ended: float
    problem: str = ""
    kind: str = ""
    equal: bool = True


@dataclass(frozen=True, kw_only=True)
class Fault:
    """When it happened and ended by itself or was undone, and when routers noticed each host that they must notice."""

    kind: Kind
    victims: tuple[str, ...]
    at: float
    undone: float
    end: float
    noticed: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a drill may cost. None: it is not judged."""

    stall_s: float | None = None
    """By how much the longest silence of a stream may exceed a usual one, at the 99th percentile of streams."""
    plus_prefill: bool = False
    """A stream that goes on elsewhere is computed anew there: that may cost what a first piece usually costs."""
    detection_s: float | None = None
    new_requests_s: float | None = None
    routed_around_s: float | None = None
    throughput: bool = False
    may_cut: bool = False
    """Streams may end in a break of their connection, which clients repeat: those of an ingress that died."""


NO_STALL_S = 0.1
"""What a busy machine does to streams by itself."""
BUDGETS: Mapping[Kind, Budget] = {
    Kind.KILL_HOST: Budget(stall_s=0.25, detection_s=0.05, throughput=True),
    Kind.HANG_HOST: Budget(stall_s=1.0),
    Kind.SLOW_HOST: Budget(routed_around_s=2.0),
    Kind.PARTITION: Budget(stall_s=1.0),
    Kind.KILL_REPLICAS: Budget(),
    Kind.KILL_ROUTER: Budget(stall_s=1.0, plus_prefill=True),
    Kind.HANG_ROUTER: Budget(stall_s=1.0, plus_prefill=True),
    Kind.KILL_CONTROLLER: Budget(stall_s=NO_STALL_S),
    Kind.KILL_INGRESS: Budget(new_requests_s=1.0, may_cut=True),
}
CUT_KINDS = ("cut_off", "disconnect", "connect")
THROUGHPUT_S = 10.0
THROUGHPUT_SHARE = 0.9
NEW_S = 3.0
"""Requests sent within this after a fault are new."""
STALL_AFTER_S = 10.0
"""A gap that begins later than this after a fault is not its doing."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One drill, all its faults together. Times in seconds, throughput in pieces of text per second.

    `usual_gap_p99_s` is that of gaps between a stream's pieces without a fault, `usual_first_p99_s` that of the wait
    for the first one. `stall_*_s` are of the longest gap of each stream that a fault met, less that of usual gaps.
    """

    drill: str
    faults: int
    victims: tuple[str, ...]
    requests: int
    failed: int
    cut_off: int
    compared: int
    equal: int
    usual_gap_p99_s: float
    usual_first_p99_s: float
    stall_p50_s: float
    stall_p99_s: float
    stall_max_s: float
    detection_max_s: float | None
    undetected: int
    new_request_max_s: float | None
    routed_around_s: float | None
    throughput_before: float
    throughput_during: float
    throughput_after: float
    broken: tuple[str, ...]
    """The budgets that were broken, each a sentence."""
    problems: tuple[str, ...]


def judge(kind: Kind, told: Sequence[Told], faults: Sequence[Fault], began: float, num_hosts: int) -> Verdict:
    """What the drill `kind` cost. `began` is when the load had come up, before the first fault."""
    budget = BUDGETS[kind]
    wrong = [one for one in told if one.problem]
    cut = [one for one in wrong if budget.may_cut and one.kind in CUT_KINDS]
    failed = [one for one in wrong if one not in cut]
    whole = [one for one in told if not one.problem]
    usual = quantile([gap for one in whole for gap in _calm_gaps(one, faults)], 0.99)
    stalls = [max(0.0, gap - usual) for fault in faults for gap in _stalls(told, fault)]
    late = [max(0.0, seconds - usual) for fault in faults for seconds in _late_gaps(told, fault, budget)]
    detections = [noticed - fault.at for fault in faults for noticed in fault.noticed.values() if noticed is not None]
    verdict = Verdict(
        drill=kind,
        faults=len(faults),
        victims=tuple(name for fault in faults for name in fault.victims),
        requests=len(told),
        failed=len(failed),
        cut_off=len(cut),
        compared=len(whole),
        equal=sum(one.equal for one in whole),
        usual_gap_p99_s=usual,
        usual_first_p99_s=_usual_first(told, faults),
        stall_p50_s=quantile(stalls, 0.5),
        stall_p99_s=quantile(stalls, 0.99),
        stall_max_s=max(stalls, default=0.0),
        detection_max_s=max(detections, default=None),
        undetected=sum(noticed is None for fault in faults for noticed in fault.noticed.values()),
        new_request_max_s=max((_new_requests(told, fault) for fault in faults), default=None),
        routed_around_s=max(late, default=None) if budget.routed_around_s is not None else None,
        throughput_before=_rate(told, began, faults[0].at),
        throughput_during=_mean(_rate(told, fault.at, fault.at + THROUGHPUT_S) for fault in faults),
        throughput_after=_mean(_rate(told, max(fault.undone, fault.at + 1.0), fault.end) for fault in faults),
        broken=(),
        problems=tuple(sorted({one.problem for one in failed}))[:5],
    )
    return replace(verdict, broken=tuple(_broken(verdict, budget, num_hosts)))


def _broken(verdict: Verdict, budget: Budget, num_hosts: int) -> Iterable[str]:
    """What must not be, in sentences."""
    if verdict.failed:
        yield f"{verdict.failed} of {verdict.requests} requests failed"
    if verdict.equal < verdict.compared:
        yield f"{verdict.compared - verdict.equal} of {verdict.compared} answers differ from those without faults"
    if budget.detection_s is not None and verdict.undetected:
        yield f"{verdict.undetected} faults were not detected by any router"
    stall_s = budget.stall_s
    if stall_s is not None and budget.plus_prefill:
        stall_s += verdict.usual_first_p99_s
    bounds = (
        ("stall p99", verdict.stall_p99_s, stall_s),
        ("detection", verdict.detection_max_s, budget.detection_s),
        ("the wait of new requests", verdict.new_request_max_s, budget.new_requests_s),
        ("the last long silence after the fault", verdict.routed_around_s, budget.routed_around_s),
    )
    for what, seconds, allowed in bounds:
        if allowed is not None and seconds is not None and seconds > allowed:
            yield f"{what}: {seconds * 1e3:.0f} ms where {allowed * 1e3:.0f} are allowed"
    floor = THROUGHPUT_SHARE * verdict.throughput_before * (1 - 1 / max(num_hosts, 2))
    if budget.throughput and verdict.throughput_during < floor:
        yield f"throughput: {verdict.throughput_during:.1f} pieces/s where {floor:.1f} are wanted"


def _gaps(one: Told) -> list[tuple[float, float]]:
    """(begin, end) of the silences of a stream, the first and the last one included."""
    points = (one.sent, *one.times, one.ended)
    return list(itertools.pairwise(points))


def _calm_gaps(one: Told, faults: Sequence[Fault]) -> list[float]:
    """Silences between pieces that no fault met."""
    return [end - begin for begin, end in itertools.pairwise(one.times) if not _is_met(begin, end, faults)]


def _stalls(told: Sequence[Told], fault: Fault) -> list[float]:
    """The longest silence of every stream that was under way at the fault, from then on."""
    met = [one for one in told if one.sent <= fault.at <= one.ended]
    return [
        max(
            (end - begin for begin, end in _gaps(one) if end >= fault.at and begin <= fault.at + STALL_AFTER_S),
            default=0.0,
        )
        for one in met
    ]


def _late_gaps(told: Sequence[Told], fault: Fault, budget: Budget) -> list[float]:
    """How long after the fault silences of streams ended that were longer than a quarter of what is allowed."""
    if budget.routed_around_s is None:
        return []
    usual = quantile([gap for one in told for gap in _calm_gaps(one, [fault])], 0.99)
    long = [
        end - fault.at
        for one in told
        for begin, end in _gaps(one)
        if fault.at <= end and begin <= fault.undone and end - begin > usual + budget.routed_around_s / 4
    ]
    return [max(long, default=0.0)]


def _new_requests(told: Sequence[Told], fault: Fault) -> float:
    """How much longer than usual any request that was sent just after the fault waited for its first piece."""
    usual = _usual_first(told, [fault])
    soon = [one for one in told if fault.at <= one.sent <= fault.at + NEW_S]
    return max((max(0.0, (*one.times, one.ended)[0] - one.sent - usual) for one in soon), default=0.0)


def _usual_first(told: Sequence[Told], faults: Sequence[Fault]) -> float:
    """How long requests waited for their first piece that no fault met, at the 99th percentile."""
    first = [(one.sent, one.times[0]) for one in told if one.times]
    return quantile([end - begin for begin, end in first if not _is_met(begin, end, faults)], 0.99)


def _is_met(begin: float, end: float, faults: Sequence[Fault]) -> bool:
    return any(begin <= fault.end and end >= fault.at for fault in faults)


def _rate(told: Sequence[Told], begin: float, end: float) -> float:
    count = sum(begin <= instant < end for one in told for instant in one.times)
    return count / (end - begin) if end > begin else 0.0


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of `values` do not exceed; 0 of none."""
    if not values:
        return 0.0
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
