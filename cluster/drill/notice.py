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


def noticed(status: ClusterStatus, host: str, since: float) -> float | None:
    """When the last router that noticed anything about `host` after `since` did so; None when none did.

    Instants are those of `time.time()`.
    """
    return noticed_in(_pages(status), host, since)


def noticed_in(pages: Iterable[str], host: str, since: float) -> float | None:
    """The same from the routers' metrics `pages`."""
    first_of_each = [min(times) for times in (_times(page, host, since) for page in pages) if times]
    return max(first_of_each, default=None)


def _times(page: str, host: str, since: float) -> list[float]:
    return [
        float(value)
        for name, state, value in ENTERED.findall(page)
        if name == host and state in NOTICED and float(value) >= since - CLOCK_S
    ]


def _pages(status: ClusterStatus) -> Iterable[str]:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for router in status.routers:
        with suppress(OSError), direct.open(f"http://{router.metrics_address}/metrics", timeout=TIMEOUT_S) as page:
            yield page.read().decode()
