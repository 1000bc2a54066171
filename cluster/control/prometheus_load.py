"""The load as a Prometheus server has it. It is asked for raw samples; rates are made in `samples`."""

from __future__ import annotations

import re
from urllib.parse import quote

from cluster.control.fleet import Load
from cluster.control.http_get import get
from cluster.control.prometheus_answer import parse_series, parse_time
from cluster.control.reading import WINDOW_S, Expected, Held
from cluster.control.samples import WANTED, load_of

TIMEOUT_S = 5.0
MAX_BYTES = 128 << 20


class PrometheusLoad:
    """Reads through the HTTP query API at `url`.

    Series that bear the label `cluster`, as `/targets` gives it, are read only if it is `cluster`.
    """

    def __init__(self, url: str, cluster: str, *, window_s: float = WINDOW_S, timeout_s: float = TIMEOUT_S) -> None:
        self._url = url.rstrip("/")
        self._window_s = window_s
        self._timeout_s = timeout_s
        self._query = selector(cluster, window_s)

    def load(self, expected: Expected, now: float) -> Load | Held:
        """See `LoadSource`. Blocks for two answers, `timeout_s` each at most."""
        # The server's clock: ours may differ, and age is a difference of instants of one clock.
        body = self._ask("time()")
        at = body if isinstance(body, Held) else parse_time(body)
        if isinstance(at, Held):
            return at
        body = self._ask(self._query, at)
        series = body if isinstance(body, Held) else parse_series(body)
        if isinstance(series, Held):
            return series
        return load_of(series, expected, at, self._window_s, now)

    def _ask(self, query: str, at: float | None = None) -> bytes | Held:
        when = "" if at is None else f"&time={at:.3f}"
        return get(f"{self._url}/api/v1/query?query={quote(query)}{when}", self._timeout_s, MAX_BYTES)


def selector(cluster: str, window_s: float) -> str:
    """PromQL for the raw samples of a window, of `cluster` or without a label that says."""
    names = "|".join(sorted(WANTED))
    quoted = re.escape(cluster).replace("\\", "\\\\").replace('"', '\\"')
    return f'{{__name__=~"{names}",cluster=~"|{quoted}"}}[{round(window_s * 1000)}ms]'
