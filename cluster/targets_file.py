"""Keeps a file up to date from a thread of its own: the list of targets that Prometheus's `file_sd` reads."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from experts.errors import InvalidInput

EVERY_S = 1.0

log = logging.getLogger(__name__)


class TargetsFile:
    """Writes what `make` returns to `path` whenever it has changed, as a whole and readable by everyone.

    What cannot be made or written is tried again a second later, and logged once. Raises InvalidInput when the file
    cannot be written at the start.
    """

    def __init__(self, path: Path, make: Callable[[], bytes], every_s: float = EVERY_S) -> None:
        self._path = path
        self._make = make
        self._every_s = every_s
        self._written = b""
        self._failing = False
        self._stopping = threading.Event()
        try:
            replace_file(path, b"[]")
        except OSError as error:
            raise InvalidInput("targets-file", str(path), f"must be a file that can be written: {error}") from None
        self._thread = threading.Thread(target=self._run, name="targets-file", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The file stays, with what it said last."""
        self._stopping.set()
        self._thread.join(timeout=5.0)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._write()
                self._failing = False
            except Exception:
                if not self._failing:
                    log.exception("%s cannot be brought up to date", self._path)
                self._failing = True
            self._stopping.wait(self._every_s)

    def _write(self) -> None:
        content = self._make()
        if content != self._written:
            replace_file(self._path, content)
            self._written = content


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in the place of `path`, so that a reader sees the old or the new whole. Raises OSError."""
    # Not named *.json: Prometheus may watch all of those in the folder.
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), "wb") as file:
            file.write(content)
        os.replace(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
