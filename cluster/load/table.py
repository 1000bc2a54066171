"""A report for people. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.cpu_account import CpuUse, outside_engine
from cluster.load.report import Distribution, LoadReport
from cluster.load.settings import LoadSettings


def as_text(settings: LoadSettings, report: LoadReport, cpu: Sequence[CpuUse]) -> str:
    """One screen."""
    return "\n".join([_headline(settings), *_counts(report), "", *_latencies(report), "", *_rates(report, cpu)])


def _headline(settings: LoadSettings) -> str:
    kind = settings.workload + (f" ({settings.groups} prefixes of {settings.prefix})" if _shares(settings) else "")
    if settings.request_rate is None:
        load = f"{settings.concurrency} at a time"
    else:
        load = f"{settings.request_rate:g} requests/s, burstiness {settings.burstiness:g}"
    return f"{kind}: prompts of {settings.prompt} tokens, answers of {settings.output}, {load}"


def _shares(settings: LoadSettings) -> bool:
    return settings.workload == "shared-prefix"


def _counts(report: LoadReport) -> list[str]:
    lines = [f"{report.completed} requests completed, {report.failed} failed in {report.duration_s:.2f} s"]
    if report.unfinished + report.unsent:
        lines.append(f"interrupted: {report.unfinished} requests were under way, {report.unsent} not sent yet")
    lines += [f"  {error.count} × {error.kind}: {error.example}" for error in report.errors]
    if report.completed:
        prompt = (
            "" if report.prompt_tokens is None else f"{report.prompt_tokens / report.completed:.1f} prompt tokens, "
        )
        output = f"{report.output_tokens / report.completed:.1f} output tokens"
        lines.append(f"per request: {prompt}{output} (counted by {report.tokens_counted_by})")
    return lines


def _latencies(report: LoadReport) -> list[str]:
    rows = [
        ("TTFT, to the first token", report.ttft_ms),
        ("TPOT, per later token", report.tpot_ms),
        ("ITL, each gap", report.itl_ms),
        ("E2EL, to the end", report.e2el_ms),
    ]
    if report.late_ms.mean is not None:
        rows.append(("sent late by", report.late_ms))
    head = f"{'milliseconds':<26}" + "".join(f"{name:>10}" for name in ("mean", "p50", "p90", "p99"))
    return [head, *(_row(name, values) for name, values in rows)]


def _row(name: str, values: Distribution) -> str:
    numbers = (values.mean, values.p50, values.p90, values.p99)
    return f"{name:<26}" + "".join(f"{'-' if number is None else f'{number:.2f}':>10}" for number in numbers)


def _rates(report: LoadReport, cpu: Sequence[CpuUse]) -> list[str]:
    rows = [("output tokens/s", f"{report.output_tokens_per_s:.1f}")]
    if report.total_tokens_per_s is not None:
        rows.append(("all tokens/s", f"{report.total_tokens_per_s:.1f}"))
    rows.append(("requests/s", f"{report.requests_per_s:.3f}"))
    if report.goodput_per_s is not None:
        rows.append(("goodput, requests/s", f"{report.goodput_per_s:.3f}"))
    rows += [(f"CPU of {use.part}", _cpu(use.cpu_s, report)) for use in cpu]
    outside = outside_engine(cpu)
    if outside is not None:
        rows.append(("CPU outside the engine", _cpu(outside, report)))
    width = max(26, *(len(name) + 2 for name, _ in rows))
    return [f"{name:<{width}}{value}" for name, value in rows]


def _cpu(cpu_s: float, report: LoadReport) -> str:
    each = f", {cpu_s * 1e6 / report.output_tokens:.0f} µs per output token" if report.output_tokens else ""
    return f"{cpu_s:.2f} s{each}"
