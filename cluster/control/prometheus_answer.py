"""What Prometheus's query API answers, read strictly. Pure: bytes in, samples or the reason why there are none out."""

from __future__ import annotations

import json
import math
from typing import Any

from cluster.control.reading import Held
from cluster.control.samples import Series

SHOWN = 200
"""Of what somebody else says, so many characters are repeated."""


def parse_series(body: bytes) -> list[Series] | Held:
    """The answer to an instant query for a range of raw samples."""
    data = _data(body, "matrix")
    if isinstance(data, Held):
        return data
    try:
        return [_series(one) for one in _list(data)]
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        return Held(reason=f"Prometheus's answer cannot be read: {str(error)[:SHOWN]}")


def parse_time(body: bytes) -> float | Held:
    """The answer to `time()`: the server's clock."""
    data = _data(body, "scalar")
    if isinstance(data, Held):
        return data
    try:
        at, value = _point(data)
        # Both say the same; an answer out of a cache, or of somebody else, may not.
        if math.isfinite(at) and abs(at - value) < 1.0:
            return at
        return Held(reason="Prometheus does not know what time it is")
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        return Held(reason=f"Prometheus's answer cannot be read: {str(error)[:SHOWN]}")


def _data(body: bytes, kind: str) -> Any | Held:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return Held(reason="Prometheus's answer is no JSON")
    if not isinstance(answer, dict):
        return Held(reason="Prometheus's answer is no object")
    if answer.get("status") != "success":
        return Held(reason=f"Prometheus refuses: {str(answer.get('error', 'without a reason'))[:SHOWN]}")
    if answer.get("warnings"):
        # Such as that a part of the data could not be asked.
        return Held(reason=f"Prometheus warns: {str(answer['warnings'])[:SHOWN]}")
    data = answer.get("data")
    if not isinstance(data, dict) or data.get("resultType") != kind:
        return Held(reason=f"Prometheus's answer is no {kind}")
    return data.get("result")


def _series(raw: Any) -> Series:
    metric, values = raw["metric"], raw["values"]
    if not isinstance(metric, dict) or not all(isinstance(text, str) for text in metric.values()):
        raise ValueError("labels must be texts")
    name = metric.get("__name__", "")
    return Series(metric=name, labels=metric, points=tuple([_point(value) for value in _list(values)]))


def _point(raw: Any) -> tuple[float, float]:
    at, value = raw
    if isinstance(at, bool) or not isinstance(at, int | float) or not isinstance(value, str):
        raise ValueError("a sample must be a number and a text")
    return float(at), number(value)


def number(text: str) -> float:
    """As Prometheus writes numbers, NaN and +Inf among them. Raises ValueError."""
    if "_" in text or text != text.strip():
        raise ValueError(f"{text[:SHOWN]!r} is no number")
    return float(text)


def _list(raw: Any) -> list[Any]:
    if not isinstance(raw, list):
        raise ValueError("a list is wanted")
    return raw
