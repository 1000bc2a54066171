"""The load without any Prometheus: the controller reads the pages itself, once a second, and keeps a window of it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from cluster.control.fleet import Load
from cluster.control.http_get import get
from cluster.control.page_samples import Sample, parse_page
from cluster.control.reading import Expected, Held, Page
from cluster.control.samples import WANTED, Series, load_of

EVERY_S = 1.0
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
    """Reads the pages of all that is `expected`, from threads of its own between `start` and `close`."""

    def __init__(
        self,
        expected: Callable[[], Expected],
        *,
        window_s: float = 10.0,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._expected = expected
        self._window_s = window_s
        self._every_s = every_s
        self._clock = clock
        self._window = PageWindow(window_s)
        self._stopping = threading.Event()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="scrape")
        self._thread = threading.Thread(target=self._run, name="scrape", daemon=True)
        self._problems: dict[Page, str] = {}

    def start(self) -> None:
        self._thread.start()

    def read_once(self) -> None:
        """Read every page. For the thread, or for whoever does without it."""
        expected = self._expected()
        pages = [page for page in (*expected.hosts, *expected.routers) if page.address]
        told = zip(pages, self._readers.map(self._read, pages), strict=True)
        self._problems = {page: problem for page, problem in told if problem}

    def load(self, now: float) -> Load | Held:
        """See `LoadSource`. Never blocks for the network."""
        load = load_of(self._window.series(), self._expected(), self._clock(), self._window_s, now)
        problem = next(iter(list(self._problems.values())), "")
        return Held(reason=f"{load.reason} ({problem})") if isinstance(load, Held) and problem else load

    def close(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=2 * TIMEOUT_S)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while not self._stopping.is_set():
            began = self._clock()
            self.read_once()
            self._stopping.wait(max(0.0, self._every_s - (self._clock() - began)))

    def _read(self, page: Page) -> str:
        """Take in one page; returns what is wrong with it."""
        # When it was asked: what it says is at least as new.
        at = self._clock()
        body = get(f"http://{page.address}/metrics", TIMEOUT_S, MAX_PAGE_BYTES)
        if isinstance(body, Held):
            return body.reason
        try:
            self._window.take(page, at, body.decode())
        except ValueError as error:
            return f"the page of {page.name} cannot be read: {error}"
        return ""
