"""Verdicts of drills for people."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.drill.verdict import Verdict


def lines_of(verdict: Verdict) -> Iterable[str]:
    """A few lines on one drill: what was broken, what was seen, what was too much."""
    what = f"{verdict.drill}: {verdict.faults} × ({', '.join(sorted(set(verdict.victims)))})"
    yield f"{what}: {'BROKEN' if verdict.broken else 'kept'}"
    yield (
        f"  {verdict.requests} requests, {verdict.failed} failed, {verdict.cut_off} cut off (safe to repeat), "
        f"{verdict.equal} of {verdict.compared} whole answers as without faults"
    )
    yield (
        f"  stall p50 {_ms(verdict.stall_p50_s)}, p99 {_ms(verdict.stall_p99_s)}, worst {_ms(verdict.stall_max_s)} "
        f"beyond a usual gap's p99 of {_ms(verdict.usual_gap_p99_s)}; detected within {_ms(verdict.detection_max_s)}"
    )
    if verdict.routed_around_s is not None:
        yield f"  the last long silence ended {verdict.routed_around_s:.2f} s after it began"
    yield (
        f"  pieces/s before {verdict.throughput_before:.1f}, in the 10 s after {verdict.throughput_during:.1f}, "
        f"once mended {verdict.throughput_after:.1f}"
    )
    yield from (f"  broken budget: {sentence}" for sentence in verdict.broken)
    yield from (f"  failure: {problem}" for problem in verdict.problems)


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.0f} ms"
