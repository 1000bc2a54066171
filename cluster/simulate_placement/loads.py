"""Loads to plan for: Zipf's law with drift and shifts, or a trace that was recorded. Seeded; knows nothing of plans."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from experts.errors import InvalidInput
from experts.placement import ExpertKey

Rows = dict[ExpertKey, float]
"""Rows per second of every (layer, expert)."""

MAX_LINE_BYTES = 8 * 1024 * 1024
LEAST_INTERVAL_S, MOST_INTERVAL_S = 1e-3, 1e9
MOST_ROWS = 1e18
"""In one interval. Counters do not come this far, and sums of it are still numbers."""


class Source(Protocol):
    """Where a load comes from. `step` gives the next interval's rows; None when there is no more."""

    def step(self, interval_s: float) -> Rows | None: ...


@dataclass(frozen=True, kw_only=True)
class ZipfSettings:
    """The expert of rank r in a layer gets a share of r to the power -`exponent` of `rows_per_s`.

    Shares walk at random: after a minute they differ by about `drift` of themselves. Every `shift_s` seconds (0: never)
    all ranks are dealt anew.
    """

    exponent: float
    layers: int
    experts: int
    rows_per_s: float
    drift: float = 0.0
    shift_s: float = 0.0


class ZipfLoad:
    """A synthetic load without an end."""

    def __init__(self, settings: ZipfSettings, rng: random.Random) -> None:
        self._settings = settings
        self._rng = rng
        self._shift_in = settings.shift_s
        self._weights: list[list[float]] = []
        self._deal()

    def step(self, interval_s: float) -> Rows:
        settings, rng = self._settings, self._rng
        if settings.shift_s > 0.0:
            self._shift_in -= interval_s
            if self._shift_in < 0.0:
                self._shift_in += settings.shift_s
                self._deal()
        if settings.drift > 0.0:
            pace = settings.drift * math.sqrt(interval_s / 60.0)
            self._weights = [
                [weight * math.exp(pace * rng.gauss(0.0, 1.0)) for weight in each] for each in self._weights
            ]
        rows: Rows = {}
        for layer, weights in enumerate(self._weights):
            scale = settings.rows_per_s / sum(weights)
            for expert, weight in enumerate(weights):
                rows[layer, expert] = weight * scale
        return rows

    def _deal(self) -> None:
        ranks = [(rank + 1.0) ** -self._settings.exponent for rank in range(self._settings.experts)]
        self._weights = [self._rng.sample(ranks, len(ranks)) for _ in range(self._settings.layers)]


class TraceLoad:
    """A recorded load: a file of JSON lines, `{"interval_s": 5.0, "rows": {"LAYER": [rows of expert 0, …], …}}`.

    Each line is one interval; `rows` are those of the whole interval. Raises InvalidInput: "trace".
    """

    def __init__(self, path: Path) -> None:
        self._intervals = list(_read(path))
        if not self._intervals:
            raise InvalidInput("trace", str(path), "must have at least one interval")
        if any(rows.keys() != self.keys for _, rows in self._intervals):
            raise InvalidInput("trace", str(path), "must have the same layers and experts in every interval")
        self._place, self._left = 0, self._intervals[0][0]

    @property
    def keys(self) -> set[ExpertKey]:
        return set(self._intervals[0][1])

    @property
    def seconds(self) -> float:
        return sum(interval_s for interval_s, _ in self._intervals)

    def step(self, interval_s: float) -> Rows | None:
        """The mean of what was recorded during the next `interval_s`."""
        rows = dict.fromkeys(self._intervals[0][1], 0.0)
        left = interval_s
        while left > 1e-9:
            if self._place == len(self._intervals):
                return None if left == interval_s else {key: value / (interval_s - left) for key, value in rows.items()}
            taken = min(left, self._left)
            whole_s, counted = self._intervals[self._place]
            for key, value in counted.items():
                rows[key] += value * taken / whole_s
            left -= taken
            self._left -= taken
            if self._left <= 1e-9:
                self._place += 1
                self._left = self._intervals[self._place][0] if self._place < len(self._intervals) else 0.0
        return {key: value / interval_s for key, value in rows.items()}


def _read(path: Path) -> Iterator[tuple[float, Rows]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise InvalidInput(
                        "trace", f"{path}:{number}", f"must have lines of at most {MAX_LINE_BYTES} bytes"
                    )
                if line.strip():
                    yield _interval(line, f"{path}:{number}")
    except OSError as error:
        raise InvalidInput("trace", str(path), f"must be a file that can be read ({error.strerror})") from None


def _interval(line: bytes, where: str) -> tuple[float, Rows]:
    rule = (
        'must be {"interval_s": SECONDS, "rows": {"LAYER": [ROWS, …], …}} with numbers of at least 0, '
        f"of {LEAST_INTERVAL_S:g} to {MOST_INTERVAL_S:g} seconds and up to {MOST_ROWS:g} rows"
    )
    try:
        raw: Any = json.loads(line)
        interval_s = _number(raw["interval_s"], LEAST_INTERVAL_S, MOST_INTERVAL_S)
        rows = {
            (_layer(layer), expert): _number(count, 0.0, MOST_ROWS)
            for layer, counts in raw["rows"].items()
            for expert, count in enumerate(_list(counts))
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidInput("trace", where, rule) from None
    if not rows:
        raise InvalidInput("trace", where, rule)
    return interval_s, rows


def _number(raw: Any, least: float, most: float) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not least <= raw <= most:
        raise ValueError("no number that can be")
    return float(raw)


def _layer(text: str) -> int:
    # One way to write each: else two entries could be of the same layer.
    if not text.isascii() or len(text) > 9 or str(int(text)) != text or int(text) < 0:
        raise ValueError("no layer")
    return int(text)


def _list(raw: Any) -> list[Any]:
    if not isinstance(raw, list):
        raise ValueError("no list")
    return raw
