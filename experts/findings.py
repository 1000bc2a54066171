"""What is wrong, or merely odd, about a model folder: one sentence of data each. Knows no files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from experts.errors import CheckpointError, InvalidInput

_MAX_SHOWN = 200


class Severity(StrEnum):
    """An error makes a folder unfit to be served; a note does not."""

    ERROR = "error"
    NOTE = "note"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`subject` is a tensor or field of `file`, empty where it is the file as a whole. `sentence` replaces the usual
    wording of the problem."""

    file: str
    subject: str = ""
    expected: str
    found: str
    severity: Severity = Severity.ERROR
    sentence: str = ""

    @property
    def where(self) -> str:
        return printable(f"{self.file}: {self.subject}" if self.subject else self.file)

    @property
    def problem(self) -> str:
        return printable(self.sentence or f"expected {self.expected}, found {self.found}")

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def from_error(error: CheckpointError, expected: str) -> Finding:
    """The finding in an error that somebody raised instead of collecting it."""
    file, _, subject = error.where.partition(": ")
    cause = error.__cause__
    if isinstance(cause, InvalidInput):
        return Finding(file=file, subject=cause.field, expected=cause.rule, found=shown(cause.value))
    return Finding(file=file, subject=subject, expected=expected, found=error.problem, sentence=error.problem)


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """Those that make the folder unfit."""
    return [finding for finding in findings if finding.severity is Severity.ERROR]


def raise_first(findings: Iterable[Finding]) -> None:
    """Raise CheckpointError for the first error among them, if there is one."""
    for finding in errors(findings):
        raise CheckpointError(finding.where, finding.problem)


def printable(text: str) -> str:
    """One line for a terminal: files may be hostile. Shortened when long."""
    text = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text[: 2 * _MAX_SHOWN])
    return text if len(text) <= 2 * _MAX_SHOWN else text[: 2 * _MAX_SHOWN - 1] + "…"


def shown(value: object) -> str:
    """A value out of a file as JSON would write it, shortened when long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    # Converting thousands of digits takes quadratic time, and Python refuses it.
    text = "a huge integer" if isinstance(value, int) and value.bit_length() > 1000 else repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"
