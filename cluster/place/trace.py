"""Traces of the load: rows per interval of every expert, as `herd simulate placement --trace` and `herd plan --load`
read them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from cluster.show import Found
from cluster.simulate_placement.loads import TraceLoad
from experts.errors import ControllerUnreachable, InvalidInput
from experts.grpc_control import fetch_rows
from experts.placement import ExpertKey
from experts.reports import CountedRows

Life = tuple[str, int]
"""A host, and its incarnation."""


class Differ:
    """Turns counters of hosts that come, go and begin anew into rows of an interval."""

    def __init__(self) -> None:
        self._last: dict[Life, Mapping[ExpertKey, int]] = {}

    def take(self, counted: list[CountedRows]) -> dict[ExpertKey, int]:
        """Rows since the last call. What a life had counted when it was first seen is of before, except that of a
        host's later lives."""
        rows: dict[ExpertKey, int] = {}
        known = {host for host, _ in self._last}
        for one in counted:
            life = (one.host, one.incarnation)
            before = self._last.get(life, {} if one.host in known else one.rows)
            for key, total in one.rows.items():
                rows[key] = rows.get(key, 0) + max(0, total - before.get(key, 0))
        self._last = {(one.host, one.incarnation): one.rows for one in counted}
        return rows


def record(found: Found, path: Path, interval_s: float, seconds: float | None) -> int:
    """Write a line for each interval until `seconds` are over, or until interrupted. Raises InvalidInput and, when the
    controller is not there at the start, ControllerUnreachable."""
    differ = Differ()
    differ.take(fetch_rows(found.address, tls=found.tls)[0])
    try:
        with open(path, "w", encoding="utf-8") as file:
            _record(found, differ, file, interval_s, seconds)
    except OSError as error:
        raise InvalidInput("file", str(path), f"must be a file that can be written ({error.strerror})") from None
    except KeyboardInterrupt:
        pass
    return 0


def _record(found: Found, differ: Differ, file: TextIO, interval_s: float, seconds: float | None) -> None:
    began = last = time.monotonic()
    number = 0
    while seconds is None or (number + 1) * interval_s <= seconds + 1e-9:
        number += 1
        time.sleep(max(0.0, began + number * interval_s - time.monotonic()))
        try:
            counted, keys = fetch_rows(found.address, tls=found.tls)
        except ControllerUnreachable:
            # The next line is of a longer interval.
            continue
        now = time.monotonic()
        file.write(line(now - last, differ.take(counted), keys) + "\n")
        file.flush()
        last = now


def line(interval_s: float, rows: Mapping[ExpertKey, int], keys: frozenset[ExpertKey]) -> str:
    """An interval as JSON: of every layer the rows of all its experts, from expert 0 on."""
    layers: dict[int, list[int]] = {}
    for layer in sorted({layer for layer, _ in keys}):
        experts = 1 + max(expert for other, expert in keys if other == layer)
        layers[layer] = [rows.get((layer, expert), 0) for expert in range(experts)]
    return json.dumps(
        {"interval_s": round(interval_s, 6), "rows": {str(layer): each for layer, each in layers.items()}}
    )


def read_mean(path: Path) -> Mapping[ExpertKey, float]:
    """Rows per second of every expert, over all of a trace. Raises InvalidInput."""
    trace = TraceLoad(path)
    rows = trace.step(trace.seconds)
    assert rows is not None
    return rows
