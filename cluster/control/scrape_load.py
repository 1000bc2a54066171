"""The load without any Prometheus: the controller reads the pages itself, and keeps a window of it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from cluster.control.fleet import Load
from cluster.control.http_get import get
from cluster.control.page_samples import Sample, parse_page
from cluster.control.reading import WINDOW_S, Expected, Held, Page
from cluster.control.samples import WANTED, Series, load_of

TIMEOUT_S = 2.0
MAX_PAGE_BYTES = 32 << 20
READERS = 8


class PageWindow:
    """What was read of pages in the last `window_s`. Knows neither network nor clock."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._lock = threading.Lock()
        self._read: dict[Page, deque[tuple[float, list[Sample]]]] = {}

    def take(self, page: Page, at: float, text: str) -> None:
        """Raises ValueError when `text` is no page that can be understood; then nothing of it counts."""
        samples = parse_page(text, WANTED)
        with self._lock:
            self._read.setdefault(page, deque()).append((at, samples))
            self._forget(at)

    def series(self) -> list[Series]:
        """All of it as series."""
        points: dict[tuple[Page, str, tuple[tuple[str, str], ...]], list[tuple[float, float]]] = defaultdict(list)
        with self._lock:
            for page, readings in self._read.items():
                for at, samples in readings:
                    for sample in samples:
                        points[page, sample.metric, sample.labels].append((at, sample.value))
        return [
            Series(
                metric=metric,
                labels={**dict(labels), "instance": page.address, "name": page.name},
                points=tuple(values),
            )
            for (page, metric, labels), values in points.items()
        ]

    def _forget(self, now: float) -> None:
        for page, readings in list(self._read.items()):
            while readings and readings[0][0] < now - self._window_s:
                readings.popleft()
            if not readings:
                del self._read[page]


class ScrapeLoad:
    """Reads the pages of all that is expected, whenever it is asked, and remembers what it read before."""

    def __init__(
        self,
        *,
        window_s: float = WINDOW_S,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window_s = window_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._window = PageWindow(window_s)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="scrape")
        self._reading: dict[Page, Future[str]] = {}

    def load(self, expected: Expected, now: float) -> Load | Held:
        """See `LoadSource`. Blocks for `timeout_s` at most; pages that take longer are read for the next time."""
        problem = self._read_all([page for page in (*expected.hosts, *expected.routers) if page.address])
        load = load_of(self._window.series(), expected, self._clock(), self._window_s, now)
        return Held(reason=f"{load.reason} ({problem})") if isinstance(load, Held) and problem else load

    def _read_all(self, pages: list[Page]) -> str:
        """Returns what is wrong with one of them; empty when all were read."""
        for page in pages:
            # Of a page that is being read still there must not be two readings at a time: they could change places.
            if page not in self._reading:
                self._reading[page] = self._readers.submit(self._read, page)
        done, late = wait(self._reading.values(), timeout=self._timeout_s)
        self._reading = {page: reading for page, reading in self._reading.items() if reading in late}
        problems = [problem for reading in done if (problem := reading.result())]
        problems += [f"{page.name} takes long" for page in self._reading]
        return min(problems, default="")

    def _read(self, page: Page) -> str:
        """Take in one page; returns what is wrong with it."""
        # When it was asked: what it says is at least as new.
        at = self._clock()
        body = get(f"http://{page.address}/metrics", self._timeout_s, MAX_PAGE_BYTES)
        if isinstance(body, Held):
            return body.reason
        try:
            self._window.take(page, at, body.decode())
        except ValueError as error:
            return f"the page of {page.name} cannot be read: {error}"
        return ""
