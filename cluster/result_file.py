"""The file that a bench writes its results to. Knows nothing of what is in it."""

from __future__ import annotations

from experts.errors import InvalidInput

STANDARD_OUTPUT = "-"


def check_result_file(file: str | None) -> None:
    """Raises InvalidInput unless `file` can be written: before a long run, not after it. None and "-" are no files."""
    if file not in (None, STANDARD_OUTPUT):
        _write(file, "", "a")


def write_result(file: str, document: str) -> None:
    """Raises InvalidInput when it cannot be written."""
    _write(file, document + "\n", "w")


def _write(file: str, text: str, mode: str) -> None:
    try:
        with open(file, mode, encoding="utf-8") as opened:
            opened.write(text)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput("json", file, f"must be a file that can be written: {why}") from None
