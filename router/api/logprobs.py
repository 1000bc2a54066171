"""Log probabilities in an answer: which go out with which text, and how OpenAI's responses write them.

A token goes out with the first character of its text. So tokens whose text a stop string cuts off completely are
left out, one that is cut in the middle is there as a whole, and the tokens of one character stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from router.api.backend import Tokenizer
from router.engine.request import TokenLogprobs

LEAST = -9999.0
"""Stands for the logarithm of nothing, which JSON cannot hold."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A token that is, or might have been, at one place. `raw` is None where the token adds nothing to an answer."""

    text: str
    raw: bytes | None
    logprob: float


@dataclass(frozen=True, kw_only=True)
class ScoredToken:
    """One token of an answer. `offset` counts the characters of the answer before its text."""

    chosen: Candidate
    top: tuple[Candidate, ...]
    offset: int


class Scores:
    """The scored tokens of one answer, held until their text goes out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[ScoredToken] = []
        self._num_made = 0
        self._num_shown = 0

    def add(self, token_id: int, logprobs: TokenLogprobs, num_chars: int) -> None:
        """The next token; the answer has `num_chars` more characters with it, shown or not."""
        top = tuple(self._candidate(other, logprob) for other, logprob in logprobs.top)
        chosen = self._candidate(token_id, logprobs.logprob)
        self._held.append(ScoredToken(chosen=chosen, top=top, offset=self._num_made))
        self._num_made += num_chars

    def show(self, num_chars: int) -> None:
        """So many characters more may be seen."""
        self._num_shown += num_chars

    def take(self) -> tuple[ScoredToken, ...]:
        """Tokens whose text has begun to be seen."""
        ready = sum(token.offset < self._num_shown for token in self._held)
        taken, self._held = self._held[:ready], self._held[ready:]
        return tuple(taken)

    def take_all(self) -> tuple[ScoredToken, ...]:
        """All tokens that are left, those without text too."""
        taken, self._held = self._held, []
        return tuple(taken)

    def _candidate(self, token_id: int, logprob: float) -> Candidate:
        raw = self._tokenizer.token_bytes(token_id) or None
        # NaN cannot be: such a token is never chosen.
        return Candidate(text=self._tokenizer.decode([token_id]), raw=raw, logprob=max(logprob, LEAST))


def chat_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """`choices[].logprobs` of `chat.completion` and of its chunks."""
    content = [{**_entry(token.chosen), "top_logprobs": [_entry(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """`choices[].logprobs` of `text_completion`. Of tokens of the same text, the likeliest counts."""
    return {
        "tokens": [token.chosen.text for token in tokens],
        "token_logprobs": [token.chosen.logprob for token in tokens],
        "top_logprobs": [_by_text(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _by_text(token: ScoredToken) -> dict[str, float]:
    """The chosen token is among them, whether it is likely or not."""
    found: dict[str, float] = {}
    for candidate in (*token.top, token.chosen):
        found.setdefault(candidate.text, candidate.logprob)
    return found


def _entry(candidate: Candidate) -> dict[str, Any]:
    raw = None if candidate.raw is None else list(candidate.raw)
    return {"token": candidate.text, "logprob": candidate.logprob, "bytes": raw}
