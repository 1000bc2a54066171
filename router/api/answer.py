"""One answer: token events of the backend to text pieces, stop strings applied. Owns the backend's stream.

Knows nothing of HTTP or of the shape of a response.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from experts.errors import RouterLost
from router.api.backend import Detokenizer, EventStream
from router.api.errors import deadline_error, finish_error
from router.api.logprobs import ScoredToken, Scores
from router.engine.request import Event, FinishEvent, FinishReason, TokenLogprobs
from router.prompt.stops import StopStrings

GRACE_S = 2.0
"""How long after the deadline we wait for the backend to say why there is no answer."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text to send, maybe empty. `num_tokens` counts output tokens so far; `finish` is set in the last piece.
    `tokens` are those of the text, if their log probabilities were asked for."""

    text: str
    num_tokens: int
    finish: str | None = None
    tokens: tuple[ScoredToken, ...] = ()


class Transcript:
    """Tokens of one answer to the text that may be sent.

    Stop strings count after the first `min_tokens` tokens only. A token of `end_ids` ends the answer wherever the
    backend may end it, and has no text. With `scores`, tokens are kept with their log probabilities for `take_tokens`;
    one that ends the answer is not, since it is no part of it.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopStrings,
        *,
        end_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        keep_stop: bool = False,
        scores: Scores | None = None,
    ) -> None:
        self.num_tokens = 0
        self.stopped = False
        self._detokenizer = detokenizer
        self._stops = stops
        self._end_ids = end_ids
        self._min_tokens = min_tokens
        self._keep_stop = keep_stop
        self._scores = scores

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> str:
        """Text that may be sent after this token. Sets `stopped` when a stop string is complete."""
        is_end = token_id in self._end_ids and self.num_tokens >= self._min_tokens
        self.num_tokens += 1
        if is_end:
            return ""
        text = self._detokenizer.push(token_id)
        if self._scores is not None:
            assert logprobs is not None, "the backend left log probabilities out"
            self._scores.add(token_id, logprobs, len(text))
        return self._shown(text if self.num_tokens <= self._min_tokens else self._past_stops(text))

    def finish(self) -> str:
        """Text that was held back. Nothing is pushed after it. May still set `stopped`."""
        text = self._detokenizer.finish()
        text = text if self.num_tokens <= self._min_tokens else self._past_stops(text)
        return self._shown(text if self.stopped else text + self._stops.finish())

    def take_tokens(self) -> tuple[ScoredToken, ...]:
        """Tokens that belong to the text sent so far and were not taken yet."""
        return self._scores.take() if self._scores is not None else ()

    def take_last_tokens(self) -> tuple[ScoredToken, ...]:
        """The same at the end of the answer: those without text too, unless a stop string cut them off."""
        if self._scores is None or self.stopped:
            return self.take_tokens()
        return self._scores.take_all()

    def _shown(self, text: str) -> str:
        if self._scores is not None:
            self._scores.show(len(text))
        return text

    def _past_stops(self, text: str) -> str:
        text, matched = self._stops.push(text)
        if matched is None:
            return text
        self.stopped = True
        return text + matched if self._keep_stop else text


async def answer(
    submit: Callable[[], EventStream], transcript: Transcript, *, deadline: float, prefix: str = ""
) -> AsyncGenerator[Piece, None]:
    """The answer in pieces: one at the first token, then whenever there is text, then one with `finish`.

    `submit` starts the request; its stream is closed when the answer ends, fails, meets a stop string or is closed.
    `prefix` is text sent before it. `deadline` is a `time.monotonic()` instant. Raises what the backend raises, and
    ApiError for a request that ended with an error.
    """
    events = submit()
    try:
        while True:
            event = await _next_event(events, deadline + GRACE_S)
            if isinstance(event, FinishEvent):
                yield _last_piece(event, transcript, prefix)
                return
            assert event.index == transcript.num_tokens, "the backend skipped or repeated a token"
            text = prefix + transcript.push(event.token_id, event.logprobs)
            if transcript.stopped:
                # Before the client has the last text: whoever reads it may take its time.
                await events.aclose()
                tokens = transcript.take_last_tokens()
                yield Piece(text=text, num_tokens=transcript.num_tokens, finish="stop", tokens=tokens)
                return
            if text or transcript.num_tokens == 1:
                prefix = ""
                yield Piece(text=text, num_tokens=transcript.num_tokens, tokens=transcript.take_tokens())
    finally:
        await events.aclose()


async def _next_event(events: EventStream, until: float) -> Event:
    try:
        async with asyncio.timeout(max(0.0, until - time.monotonic())):
            return await anext(events)
    except TimeoutError:
        raise deadline_error() from None
    except StopAsyncIteration:
        raise RouterLost("the events ended without a finish") from None


def _last_piece(event: FinishEvent, transcript: Transcript, prefix: str) -> Piece:
    if event.reason not in (FinishReason.STOP, FinishReason.LENGTH):
        raise finish_error(event)
    text = prefix + transcript.finish()
    finish = "stop" if transcript.stopped else event.reason.value
    return Piece(text=text, num_tokens=transcript.num_tokens, finish=finish, tokens=transcript.take_last_tokens())
