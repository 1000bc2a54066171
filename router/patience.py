"""How long a router may say nothing before it is taken for stopped. Pure: time is an argument, in seconds.

A machine that is short of processors makes the living fall silent, too. Each false alarm doubles the patience, each
calm stretch halves it again.
"""

from __future__ import annotations

from dataclasses import dataclass

LIMIT = 8
"""Patience grows to this many times of its least."""
CALM_S = 30.0


@dataclass
class Patience:
    """`least_s` is where it begins and what it comes back to."""

    least_s: float
    _factor: int = 1
    _changed_at: float = 0.0

    def false_alarm(self, now: float) -> None:
        """Somebody was taken for stopped who was only slow."""
        self._factor = min(2 * self._factor, LIMIT)
        self._changed_at = now

    def seconds(self, now: float) -> float:
        """The patience at `now`."""
        while self._factor > 1 and now - self._changed_at >= CALM_S:
            self._factor //= 2
            self._changed_at += CALM_S
        return self.least_s * self._factor
