"""The load as a Prometheus server has it. It is asked for raw samples; rates are made in `samples`."""

from __future__ import annotations

import re
from urllib.parse import quote

from cluster.control.fleet import Load
from cluster.control.http_get import get
from cluster.control.prometheus_answer import parse_series, parse_time
from cluster.control.reading import WINDOW_S, Expected, Held
from cluster.control.samples import WANTED, Series, load_of

TIMEOUT_S = 5.0
MAX_BYTES = 128 << 20
WIDEST = 8
"""Times the window, where a server scrapes so rarely: each 15 s at a window of 12 s."""
MANY_SAMPLES = 20
"""Of a series that has more in a window, the window was wide enough at half of that."""


class PrometheusLoad:
    """Reads through the HTTP query API at `url`.

    Series that bear the label `cluster`, as `/targets` gives it, are read only if it is `cluster`. The window is
    `window_s` or as much wider as it takes to see enough samples.
    """

    def __init__(self, url: str, cluster: str, *, window_s: float = WINDOW_S, timeout_s: float = TIMEOUT_S) -> None:
        self._url = url.rstrip("/")
        self._cluster = cluster
        self._least_s = window_s
        self._window_s = window_s
        self._timeout_s = timeout_s

    def load(self, expected: Expected, now: float) -> Load | Held:
        """See `LoadSource`. Blocks for two answers, `timeout_s` each at most."""
        # The server's clock: ours may differ, and age is a difference of instants of one clock.
        body = self._ask("time()")
        at = body if isinstance(body, Held) else parse_time(body)
        if isinstance(at, Held):
            return at
        body = self._ask(selector(self._cluster, self._window_s), at)
        series = body if isinstance(body, Held) else parse_series(body)
        if isinstance(series, Held):
            return series
        load = load_of(series, expected, at, self._window_s, now)
        self._widen(series, load)
        return load

    def _widen(self, series: list[Series], load: Load | Held) -> None:
        """Choose the next window by what was in this one."""
        most = max((len(one.points) for one in series), default=0)
        if isinstance(load, Held) and most < MANY_SAMPLES / 4:
            wider = 2 * self._window_s
            self._window_s = wider if wider <= WIDEST * self._least_s else self._least_s
        elif most > MANY_SAMPLES or isinstance(load, Held):
            # What is held in spite of enough samples may only wait until they span more of a window this wide.
            self._window_s = max(self._least_s, self._window_s / 2)

    def _ask(self, query: str, at: float | None = None) -> bytes | Held:
        when = "" if at is None else f"&time={at:.3f}"
        return get(f"{self._url}/api/v1/query?query={quote(query)}{when}", self._timeout_s, MAX_BYTES)


def selector(cluster: str, window_s: float) -> str:
    """PromQL for the raw samples of a window, of `cluster` or without a label that says."""
    names = "|".join(sorted(WANTED))
    quoted = re.escape(cluster).replace("\\", "\\\\").replace('"', '\\"')
    return f'{{__name__=~"{names}",cluster=~"|{quoted}"}}[{round(window_s * 1000)}ms]'
