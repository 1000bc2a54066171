"""How many prompt tokens a step may take beside running streams, learnt from how long steps took.

A step of streams alone takes d seconds; each prompt token in a step with streams adds c. Both are medians of the last
few steps: a median forgets the slow first step and a single hiccup at once, and follows when streams come and go or
when a prompt gets deep. Then (stretch − 1) · d / c tokens make a step `stretch` times as long as one of the streams
alone. From one step with prompts to the next their number doubles at most, so that one wrong guess costs little.
"""

from __future__ import annotations

from collections import deque
from math import inf
from statistics import median_low

NUM_STREAM_STEPS, NUM_PROMPT_STEPS = 8, 3
"""How many steps are remembered. Of those with prompts few: what a token costs depends on how many there are, so that
the right number is only found by going there."""
LEAST_PROMPT_TOKENS = 64
"""Fewer are not worth a step's fixed costs, and too few to learn from."""
STALE_AFTER = 64
"""Steps with prompts in a row, after which one without says again what streams alone take."""


class Pace:
    """What was learnt so far. `stretch` ≥ 1; infinity asks for no limit at all."""

    def __init__(self, stretch: float) -> None:
        self._stretch = stretch
        self._streams_s: deque[float] = deque(maxlen=NUM_STREAM_STEPS)
        self._token_s: deque[float] = deque(maxlen=NUM_PROMPT_STEPS)
        self._last_tokens = LEAST_PROMPT_TOKENS // 2
        self._num_mixed = STALE_AFTER

    def learn(self, num_decodes: int, num_prompt_tokens: int, elapsed_s: float) -> None:
        """A step of so many decodes and so many tokens of prompts took `elapsed_s`."""
        if not num_decodes:
            return
        if not num_prompt_tokens:
            self._streams_s.append(elapsed_s)
            self._num_mixed = 0
            return
        self._num_mixed += 1
        if num_prompt_tokens >= LEAST_PROMPT_TOKENS and self._streams_s:
            streams_s = self._stream_s()
            self._token_s.append((elapsed_s - streams_s) / num_prompt_tokens)
            self._last_tokens = num_prompt_tokens
            if elapsed_s < streams_s:  # then the streams alone would not have taken longer
                self._streams_s.append(elapsed_s)

    def prompt_tokens(self, *, may_pause: bool) -> float:
        """How many tokens of prompts a step with decodes may take: at least `LEAST_PROMPT_TOKENS`, or 0 where prompts
        `may_pause` and it is time to see what the streams take alone."""
        if self._stretch == inf:
            return inf
        if may_pause and self._num_mixed >= STALE_AFTER:
            return 0
        if not self._token_s:
            return LEAST_PROMPT_TOKENS
        most, token_s = 2 * self._last_tokens, median_low(self._token_s)
        if token_s > 0:
            most = min(most, int((self._stretch - 1) * self._stream_s() / token_s))
        return max(LEAST_PROMPT_TOKENS, most)

    def _stream_s(self) -> float:
        """The lower median: of two, it is not the first one that was slow. What disturbs a step makes it slower."""
        return median_low(self._streams_s)
