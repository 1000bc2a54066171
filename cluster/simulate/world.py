"""Virtual time: what happens when, in one order that a seed fixes, and a log of it. Knows nothing of clusters."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

Action = Callable[[], None]

MAX_ACTIONS = 300_000
"""A history that is longer than this has something going round in circles."""


class World:
    """Runs actions at their instants, in seconds from 0. Whatever is drawn by chance is drawn from `rng`.

    Actions of one instant run in the order in which they were asked for, so that a seed has exactly one history.
    """

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.history: list[tuple[float, str, str]] = []
        """(instant, who, what): everything worth telling, in order."""
        self._actions: list[tuple[float, int, Action]] = []
        self._num_asked = self._num_run = 0

    def clock(self) -> float:
        return self.now

    def at(self, instant: float, action: Action) -> None:
        """Run `action` at `instant`, or next when that has passed."""
        self._num_asked += 1
        heapq.heappush(self._actions, (max(instant, self.now), self._num_asked, action))

    def after(self, delay_s: float, action: Action) -> None:
        self.at(self.now + delay_s, action)

    def note(self, who: str, what: str) -> None:
        """Add to the history."""
        self.history.append((self.now, who, what))

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Let time pass up to `until`, or up to the action after which `stop` holds."""
        while self._actions and self._actions[0][0] <= until:
            if stop():
                return
            self._num_run += 1
            assert self._num_run <= MAX_ACTIONS, "it goes on and on without getting anywhere"
            self.now, _, action = heapq.heappop(self._actions)
            action()
        if not stop():
            self.now = max(self.now, until)


def lines(history: list[tuple[float, str, str]]) -> list[str]:
    """A history to read."""
    return [f"{instant:12.6f}  {who:<14} {what}" for instant, who, what in history]
