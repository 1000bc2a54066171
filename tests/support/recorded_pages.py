"""Metrics pages of a cluster that is not there, second after second, for whoever reads loads."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from cluster.control.page_samples import parse_page
from cluster.control.reading import Expected, Page
from cluster.control.samples import WANTED, Series
from cluster.metrics.families import Families
from cluster.metrics.host import HostNumbers, host_families
from cluster.metrics.router import RouterNumbers, router_families
from experts.load import LoadSnapshot
from router.dispatch_stats import DispatchStats
from router.engine.engine import EngineStats
from router.engine.kv_cache import KVNumbers

LAYERS, EXPERTS = (1, 3), 4
KEYS = frozenset((layer, expert) for layer in LAYERS for expert in range(EXPERTS))
HOSTS = tuple(Page(name=f"host-{index}", address=f"127.0.0.1:{26400 + index}") for index in range(2))
ROUTERS = (Page(name="router-a", address="127.0.0.1:26410"), Page(name="router-b", address="127.0.0.1:26411"))
EXPECTED = Expected(keys=KEYS, hosts=HOSTS, routers=ROUTERS)
PLACEMENT = {key: (HOSTS[key[1] % 2].name,) for key in KEYS}


@dataclass(frozen=True)
class Reading:
    """One page as it was at an instant."""

    page: Page
    at: float
    text: str


@dataclass
class Cluster:
    """Counters that grow. `rows` per second and expert, dispatches of each router in each layer, requests."""

    rows: dict[tuple[int, int], float]
    dispatches: float = 10.0
    busy: float = 0.25
    wait_s: float = 0.5
    seconds: float = 0.0
    restarted_at: dict[str, float] = field(default_factory=dict)

    def page(self, page: Page) -> str:
        lived = self.seconds
        if lived >= self.restarted_at.get(page.name, float("inf")):
            lived -= self.restarted_at[page.name]
        families = self.families(page, lived)
        return page_text(lambda: families)

    def families(self, page: Page, lived: float) -> Families:
        """After so many seconds of life."""
        return self._host(page, lived) if page in HOSTS else self._router(lived)

    def _host(self, page: Page, lived: float) -> Families:
        held = frozenset(key for key, names in PLACEMENT.items() if page.name in names)
        rows = {key: round(self.rows[key] * lived) for key in sorted(held) if round(self.rows[key] * lived)}
        load = LoadSnapshot(
            rows=rows, rows_total=sum(rows.values()), num_shipments=1, compute_s=self.busy * lived, queue_s=0.0
        )
        return list(host_families(HostNumbers(name=page.name, load=load, held=held, held_bytes=1)))

    def _router(self, lived: float) -> Families:
        engine = EngineStats(finished=Counter())
        for _ in range(round(lived)):
            engine.durations.queue.add(self.wait_s)
        stats = DispatchStats(dispatches=round(self.dispatches * len(LAYERS) * lived))
        numbers = RouterNumbers(
            engine=engine, running=0, waiting=0, parked=0, kv=KVNumbers(), max_model_len=2, dispatch=stats
        )
        return list(router_families(numbers))


def page_text(families: Callable[[], Families]) -> str:
    """The page that these families make."""

    class Reader(Collector):
        def collect(self) -> Families:
            return families()

        def describe(self) -> Families:
            return ()

    registry = CollectorRegistry()
    registry.register(Reader())
    return generate_latest(registry).decode()


def skewed(seed: int) -> dict[tuple[int, int], float]:
    """Rows per second of every expert."""
    chance = random.Random(seed)
    return {key: float(round(10 * 10 ** chance.uniform(0.0, 2.5))) for key in sorted(KEYS)}


def record(cluster: Cluster, start: float, seconds: int = 12) -> list[Reading]:
    """All pages each second, at instants of their own as a scraper does it."""
    readings = []
    for second in range(seconds):
        for place, page in enumerate((*HOSTS, *ROUTERS)):
            cluster.seconds = second + 0.1 * place
            # Whole milliseconds, since Prometheus has no others.
            readings.append(Reading(page, round(start + cluster.seconds, 3), cluster.page(page)))
    return readings


def series_of(readings: list[Reading]) -> list[Series]:
    """The same as `load_of` takes it."""
    points: dict[tuple[Page, str, tuple[tuple[str, str], ...]], list[tuple[float, float]]] = {}
    for reading in readings:
        for sample in parse_page(reading.text, WANTED):
            key = (reading.page, sample.metric, sample.labels)
            points.setdefault(key, []).append((reading.at, sample.value))
    return [
        Series(metric=metric, labels={**dict(labels), "instance": page.address, "name": page.name}, points=tuple(some))
        for (page, metric, labels), some in points.items()
    ]
