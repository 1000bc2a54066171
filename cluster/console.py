"""What a foreground command owns of its process: the signals that end it, and the streams that people read."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

TWICE_S = 1.0
"""Wrappers and terminals may pass one Ctrl-C on twice; only one that comes later than this means "at once"."""


INTERRUPTED = 130


class Stopped(Exception):
    """Somebody asked for the end while something else was going on."""


def _exit() -> None:
    os._exit(INTERRUPTED)


class Signals:
    """SIGINT and SIGTERM ask for an orderly end; a SIGINT after that means "at once".

    `abandon` is what "at once" does. Installed before anything that takes long: Python's own way, an exception out of
    nowhere, gets lost in other people's callbacks and imports.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.abandon: Callable[[], None] = _exit
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals (again: Ray takes SIGTERM when it starts)."""
        for number in self._before:
            signal.signal(number, self._handle)

    def check(self, wait_s: float = 0.0) -> None:
        """Raises Stopped when the end was asked for, now or within `wait_s`."""
        if self.asked.wait(wait_s):
            raise Stopped

    def ending(self) -> None:
        """The end has begun, whoever asked for it."""
        if not self.asked.is_set():
            self._asked_at = time.monotonic()
            self.asked.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.asked.is_set():
            self.ending()
        elif number == signal.SIGINT and time.monotonic() - self._asked_at > TWICE_S:
            self.abandon()


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[tuple[TextIO, TextIO]]:
    """Send all that Ray, its C++ parts and its children write to `path`; yields the real output and error streams.

    Anything else would scatter lines about restarted workers over the terminal of somebody who never heard of them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    real = [os.dup(number) for number in (1, 2)]
    log_file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(log_file, number)
    os.close(log_file)
    try:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(open(os.dup(copy), "w", encoding="utf-8", buffering=1)) for copy in real]
            yield streams[0], streams[1]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), real, strict=True):
            os.dup2(copy, number)
            os.close(copy)
