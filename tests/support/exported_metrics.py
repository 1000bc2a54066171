"""Which samples the pages of all kinds of process have, and which of them an expression reads."""

from __future__ import annotations

import functools
import re
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families
from recorded_pages import page_text

from cluster.control.numbers import ControllerNumbers, PlannerNumbers
from cluster.metrics.controller import controller_families
from cluster.metrics.host import HostNumbers, host_families
from cluster.metrics.ingress import IngressNumbers, ingress_families
from cluster.metrics.router import RouterNumbers, router_families
from experts.load import LoadSnapshot
from experts.reports import ClusterStatus
from router.dispatch_stats import DispatchStats
from router.engine.engine import EngineStats
from router.engine.kv_cache import KVNumbers
from router.histogram import Histogram

_OURS = re.compile(r"\b(?:herd[a-z0-9_:]*|up|process_[a-z_]+)\b")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def metrics_in(expression: str) -> set[str]:
    """The names of metrics in an expression; what stands in quotes is none."""
    return set(_OURS.findall(_STRING.sub('""', expression)))


@functools.cache
def exported() -> frozenset[str]:
    """The names of all samples, of pages on which everything has happened once."""
    load = LoadSnapshot(rows={(0, 0): 1}, rows_total=1, num_shipments=1, compute_s=1.0)
    host = HostNumbers(name="host-0", load=load, held=frozenset({(0, 0)}), held_bytes=1)
    router = RouterNumbers(
        engine=EngineStats(),
        running=0,
        waiting=0,
        parked=0,
        kv=KVNumbers(),
        max_model_len=1,
        dispatch=DispatchStats(
            failures=Counter(HostLost=1),
            hosts={"host-0": "up"},
            entered_at={("host-0", "up"): 1.0},
            round_trips={0: Histogram()},
        ),
    )
    planner = PlannerNumbers(imbalance={0: 1.0})
    controller = ControllerNumbers(status=ClusterStatus(), replicas={(0, 0): {}}, planner=planner)
    pages = [
        page_text(lambda: host_families(host)),
        page_text(lambda: router_families(router)),
        page_text(lambda: ingress_families(IngressNumbers())),
        page_text(lambda: controller_families(controller)),
    ]
    families = [family for page in pages for family in text_string_to_metric_families(page)]
    own = frozenset(sample.name for family in families for sample in family.samples)
    return own | {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_start_time_seconds"}
