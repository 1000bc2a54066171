"""Families of samples out of plain numbers: counters, gauges and histograms, as prometheus-client wants them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from router.histogram import Histogram

Families = Iterable[Metric]


def counter(name: str, text: str, value: float) -> CounterMetricFamily:
    """Exported as `name`_total."""
    return CounterMetricFamily(name, text, value=value)


def counters(name: str, text: str, label: str, counts: Mapping[str, float]) -> CounterMetricFamily:
    """One sample for each value of `label`. Exported as `name`_total."""
    family = CounterMetricFamily(name, text, labels=(label,))
    # A copy: whoever counts may add a value meanwhile.
    for value, count in dict(counts).items():
        family.add_metric([str(value)], count)
    return family


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    """One sample for each value of `label`."""
    family = GaugeMetricFamily(name, text, labels=(label,))
    for value, amount in dict(values).items():
        family.add_metric([str(value)], amount)
    return family


def histogram(name: str, text: str, values: Histogram) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=())
    family.add_metric([], _buckets(values), values.total)
    return family


def histograms(name: str, text: str, label: str, values: Mapping[str, Histogram]) -> HistogramMetricFamily:
    """One histogram for each value of `label`."""
    family = HistogramMetricFamily(name, text, labels=(label,))
    for value, one in values.items():
        family.add_metric([value], _buckets(one), one.total)
    return family


def _buckets(values: Histogram) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in values.bounds), "+Inf"]
    return list(zip(bounds, accumulate(list(values.counts)), strict=True))
