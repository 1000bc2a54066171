"""What was found in a model folder, for people, for programs, and as an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.check import Report
from experts.errors import CheckpointError
from experts.findings import Finding, Severity, errors, printable

MAX_LINES = 20
"""Findings of one severity that people are shown; programs get all of them."""


def as_text(report: Report, name: str) -> str:
    """A line for each finding and one for the verdict on the folder called `name`."""
    wrong = errors(report.findings)
    notes = [finding for finding in report.findings if finding.severity is Severity.NOTE]
    verdict = f"can be served: {_contents(report)}" if report.is_fit else f"cannot be served: {_count(wrong, 'error')}"
    if notes:
        verdict += f", {_count(notes, 'note')}"
    return "\n".join((*_lines(wrong, "error"), *_lines(notes, "note"), f"herd: {printable(name)} {verdict}"))


def as_json(report: Report, name: str) -> dict[str, Any]:
    """Plain values under stable names."""
    findings = [
        {field: value for field, value in asdict(finding).items() if field != "sentence"} for finding in report.findings
    ]
    return {
        "model": name,
        "fit": report.is_fit,
        "tensors": report.num_tensors,
        "files": report.num_files,
        "bytes": report.num_bytes,
        "findings": findings,
    }


def require_fit(report: Report, model_dir: Path) -> None:
    """Raises CheckpointError, which says all that is wrong with the folder."""
    wrong = errors(report.findings)
    if len(wrong) == 1:
        raise CheckpointError(wrong[0].where, wrong[0].problem)
    if wrong:
        lines = "".join(f"\n  {line}" for line in _lines(wrong, "error"))
        raise CheckpointError(model_dir.resolve().name, f"cannot be served: {_count(wrong, 'error')}{lines}")


def _lines(findings: Sequence[Finding], kind: str) -> list[str]:
    shown = [f"{kind:<5}  {finding}" for finding in findings[:MAX_LINES]]
    more = len(findings) - len(shown)
    return [*shown, f"{kind:<5}  and {more} more (--json shows all)"] if more else shown


def _count(findings: Sequence[Finding], kind: str) -> str:
    return f"{len(findings)} {kind}" if len(findings) == 1 else f"{len(findings)} {kind}s"


def _contents(report: Report) -> str:
    files = f"{report.num_files} file{'' if report.num_files == 1 else 's'}"
    size = f"{report.num_bytes / 1e9:.1f} GB" if report.num_bytes >= 1e8 else f"{report.num_bytes / 1e6:.1f} MB"
    return f"{report.num_tensors} tensors, {size} in {files}"
