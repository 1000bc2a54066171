"""When routers noticed what became of a host, as their metrics pages tell."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterable
from contextlib import suppress

from experts.reports import ClusterStatus

ENTERED = re.compile(
    r'^herd_router_host_state_entered_timestamp_seconds\{host="([^"]*)",state="([^"]*)"\} (\S+)$', re.M
)
NOTICED = ("suspect", "fenced", "dead")
TIMEOUT_S = 2.0
CLOCK_S = 0.005
"""By how much an instant may seem to lie before its cause."""


def noticed_in(pages: Iterable[str], host: str, since: float) -> float | None:
    """When the last router that noticed anything about `host` after `since` did so; None when none did. `pages` are the
    metrics of each router, of several moments one after the other: a page tells only of the last time in each state.

    Instants are those of `time.time()`.
    """
    first_of_each = [min(times) for times in (_times(page, host, since) for page in pages) if times]
    return max(first_of_each, default=None)


def _times(page: str, host: str, since: float) -> list[float]:
    return [
        float(value)
        for name, state, value in ENTERED.findall(page)
        if name == host and state in NOTICED and float(value) >= since - CLOCK_S
    ]


def pages_of(status: ClusterStatus) -> list[str]:
    """The metrics page of each router now; empty where one cannot be had."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    pages = []
    for router in status.routers:
        pages.append("")
        with suppress(OSError), direct.open(f"http://{router.metrics_address}/metrics", timeout=TIMEOUT_S) as page:
            pages[-1] = page.read().decode()
    return pages
