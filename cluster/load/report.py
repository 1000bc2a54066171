"""What measured requests add up to: latencies, rates, goodput, errors by kind. Pure.

Times to the first token, between tokens and to the end are the client's: from sending the request, to what arrived.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.load.client import Answered, Failed
from cluster.load.drive import Collected


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Of milliseconds; all None where nothing was measured."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True, kw_only=True)
class ErrorKind:
    """Failures of one kind, with what one of them said."""

    kind: str
    count: int
    example: str


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """One measured load. Rates are per second of `duration_s`, from the first request to the last answer's end.

    TPOT is a request's time after its first token, per token after the first; ITL every single gap between pieces of
    text, which may hold several tokens. `tokens_counted_by` says where the numbers of output tokens come from:
    "usage", "chunks" (pieces of text, where the server gives no usage) or "both". `goodput_per_s` counts the completed
    requests that met all bounds, None without bounds. `late_ms` is how late the client itself was to send what an open
    loop had planned.
    """

    completed: int
    failed: int
    unfinished: int
    unsent: int
    duration_s: float
    prompt_tokens: int | None
    output_tokens: int
    tokens_counted_by: str
    ttft_ms: Distribution
    tpot_ms: Distribution
    itl_ms: Distribution
    e2el_ms: Distribution
    late_ms: Distribution
    output_tokens_per_s: float
    total_tokens_per_s: float | None
    requests_per_s: float
    goodput_per_s: float | None
    errors: tuple[ErrorKind, ...]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One answer in milliseconds. `tpot` is None for an answer of one token."""

    ttft: float
    tpot: float | None
    e2el: float
    gaps: tuple[float, ...]


def summarize(collected: Collected, goodput: Mapping[str, float]) -> LoadReport:
    """Add up. `goodput` are bounds in milliseconds on "ttft", "tpot" and "e2el"."""
    answers = [outcome for outcome in collected.outcomes if isinstance(outcome, Answered)]
    timings = [timing_of(answer) for answer in answers]
    duration_s = collected.duration_s
    output = sum(num_tokens(answer) for answer in answers)
    prompts = [answer.prompt_tokens for answer in answers]
    prompt = sum(count for count in prompts if count is not None) if None not in prompts else None
    good = sum(meets(timing, goodput) for timing in timings)
    return LoadReport(
        completed=len(answers),
        failed=len(collected.outcomes) - len(answers),
        unfinished=collected.unfinished,
        unsent=collected.unsent,
        duration_s=duration_s,
        prompt_tokens=prompt,
        output_tokens=output,
        tokens_counted_by=_counted_by(answers),
        ttft_ms=distribution([timing.ttft for timing in timings]),
        tpot_ms=distribution([timing.tpot for timing in timings if timing.tpot is not None]),
        itl_ms=distribution([gap for timing in timings for gap in timing.gaps]),
        e2el_ms=distribution([timing.e2el for timing in timings]),
        late_ms=distribution([late * 1e3 for late in collected.late_s]),
        output_tokens_per_s=_rate(output, duration_s),
        total_tokens_per_s=None if prompt is None else _rate(prompt + output, duration_s),
        requests_per_s=_rate(len(answers), duration_s),
        goodput_per_s=_rate(good, duration_s) if goodput else None,
        errors=_errors([outcome for outcome in collected.outcomes if isinstance(outcome, Failed)]),
    )


def timing_of(answer: Answered) -> Timing:
    """The latencies of one answer. One whose tokens have no text at all gets its first token at its end."""
    times = answer.times or (answer.ended,)
    later = num_tokens(answer) - 1
    return Timing(
        ttft=(times[0] - answer.sent) * 1e3,
        tpot=(times[-1] - times[0]) * 1e3 / later if later > 0 else None,
        e2el=(answer.ended - answer.sent) * 1e3,
        gaps=tuple((after - before) * 1e3 for before, after in itertools.pairwise(times)),
    )


def num_tokens(answer: Answered) -> int:
    """As the server counted them, else the pieces of text."""
    return len(answer.times) if answer.output_tokens is None else answer.output_tokens


def meets(timing: Timing, goodput: Mapping[str, float]) -> bool:
    """Whether an answer kept all bounds; what it does not have keeps any bound."""
    measured = {"ttft": timing.ttft, "tpot": timing.tpot, "e2el": timing.e2el}
    return all((measured[name] or 0.0) <= bound for name, bound in goodput.items())


def distribution(values: Sequence[float]) -> Distribution:
    if not values:
        return Distribution(mean=None, p50=None, p90=None, p99=None)
    ordered = sorted(values)
    p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
    return Distribution(mean=math.fsum(ordered) / len(ordered), p50=p50, p90=p90, p99=p99)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest ranks. `ordered` ascends and is not empty."""
    rank = share * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _rate(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0


def _counted_by(answers: Sequence[Answered]) -> str:
    told = {answer.output_tokens is not None for answer in answers}
    return "both" if len(told) > 1 else "chunks" if told == {False} else "usage"


def _errors(failures: Sequence[Failed]) -> tuple[ErrorKind, ...]:
    """The most frequent first; the example is the first that was seen."""
    first: dict[str, str] = {}
    counts: dict[str, int] = {}
    for failure in failures:
        first.setdefault(failure.kind, failure.message)
        counts[failure.kind] = counts.get(failure.kind, 0) + 1
    ordered = sorted(counts, key=lambda kind: (-counts[kind], kind))
    return tuple(ErrorKind(kind=kind, count=counts[kind], example=first[kind]) for kind in ordered)
