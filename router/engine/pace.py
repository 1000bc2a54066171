"""How many prompt tokens a step may take beside running streams, learnt from how long steps took.

A step of streams alone takes d seconds; each prompt token in a step with streams adds c. Both are medians of the last
few steps: a median forgets the slow first step and a single hiccup at once, and follows when streams come and go or
when a prompt gets deep. Then (stretch − 1) · d / c tokens make a step `stretch` times as long as one of the
streams alone.
"""

from __future__ import annotations

from collections import deque
from math import inf
from statistics import median, median_low

NUM_REMEMBERED = 8
LEAST_PROMPT_TOKENS = 32
"""Fewer are not worth a step's fixed costs, and too few to learn from."""
STALE_AFTER = 64
"""Steps with prompts in a row, after which one without says again what streams alone take."""


class Pace:
    """What was learnt so far. `stretch` ≥ 1; infinity asks for no limit at all."""

    def __init__(self, stretch: float) -> None:
        self._stretch = stretch
        self._streams_s: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self._token_s: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self._alone_token_s: float | None = None
        self._num_mixed = STALE_AFTER

    def learn(self, num_decodes: int, num_prompt_tokens: int, elapsed_s: float) -> None:
        """A step of so many decodes and so many tokens of prompts took `elapsed_s`."""
        if num_decodes and not num_prompt_tokens:
            self._streams_s.append(elapsed_s)
            self._num_mixed = 0
            return
        self._num_mixed += bool(num_decodes)
        if num_prompt_tokens < LEAST_PROMPT_TOKENS:
            return
        if not num_decodes:
            self._alone_token_s = elapsed_s / num_prompt_tokens
        elif self._streams_s:
            self._token_s.append((elapsed_s - self._stream_s()) / num_prompt_tokens)

    def prompt_tokens(self, *, may_pause: bool) -> float:
        """How many tokens of prompts a step with decodes may take: at least `LEAST_PROMPT_TOKENS`, or 0 where prompts
        `may_pause` and it is time to see what the streams take alone."""
        if self._stretch == inf:
            return inf
        if may_pause and self._num_mixed >= STALE_AFTER:
            return 0
        token_s = self._prompt_token_s()
        if token_s is None or not self._streams_s:
            return LEAST_PROMPT_TOKENS
        if token_s <= 0:
            return inf
        return max(LEAST_PROMPT_TOKENS, (self._stretch - 1) * self._stream_s() / token_s)

    def _stream_s(self) -> float:
        """The lower median: of two, it is not the first one that was slow."""
        return median_low(self._streams_s)

    def _prompt_token_s(self) -> float | None:
        """From prompts beside streams; before there were any, from prompts alone."""
        return median(self._token_s) if self._token_s else self._alone_token_s
