"""The body of a response, made from running answers: whole, or as the frames of an event stream.

Knows nothing of HTTP beyond those bytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from router.api.answer import Piece
from router.api.errors import ApiError
from router.api.running import Item, RunningAnswers
from router.api.service import Job
from router.api.shapes import DONE, KEEP_ALIVE, Choice, Shape, Usage, event

LOOK_UP_S = 60.0
"""How often a wait for a whole response wakes without cause; the answers themselves end by their deadline."""


async def whole(running: RunningAnswers, job: Job, shape: Shape) -> dict[str, Any]:
    """The response when all answers have ended. Raises the first error among them."""
    pieces: list[list[Piece]] = [[] for _ in job.answers]
    while running.num_open:
        for index, piece in await running.pieces(LOOK_UP_S):
            pieces[index].append(piece)
    choices = [_choice(one) for one in pieces]
    return shape.whole(choices, _usage(job, [one[-1].num_tokens for one in pieces]))


async def frames(
    running: RunningAnswers,
    first: list[Item],
    job: Job,
    shape: Shape,
    keep_alive_s: float,
    translate: Callable[[Exception], ApiError],
) -> AsyncGenerator[bytes, None]:
    """The bytes of an event stream that begins with the pieces `first`; pieces that came together leave together.

    Ends with an error event where an answer fails. When nothing comes for `keep_alive_s`, says so in a comment.
    """
    num_tokens = [0] * len(job.answers)
    opening = b"".join(event(chunk) for chunk in shape.opening(len(job.answers)))
    items = first
    try:
        while True:
            for index, piece in items:
                num_tokens[index] = piece.num_tokens
            frame = opening + (b"".join(_events(shape, item) for item in items) if items else KEEP_ALIVE)
            if frame:
                yield frame
            if not running.num_open:
                break
            opening = b""
            items = await running.pieces(keep_alive_s)
        if shape.usage_asked:
            yield event(shape.usage(_usage(job, num_tokens)))
    except Exception as error:
        yield event(translate(error).body())
    yield DONE


def _events(shape: Shape, item: Item) -> bytes:
    index, piece = item
    text = event(shape.text(index, piece.text, piece.tokens)) if piece.text or piece.tokens else b""
    return text + event(shape.finish(index, piece.finish)) if piece.finish else text


def _choice(pieces: Sequence[Piece]) -> Choice:
    text = "".join(piece.text for piece in pieces)
    tokens = [token for piece in pieces for token in piece.tokens]
    return Choice(text=text, finish=pieces[-1].finish or "", tokens=tokens)


def _usage(job: Job, num_tokens: Sequence[int]) -> Usage:
    return Usage(num_prompt_tokens=job.num_prompt_tokens, num_output_tokens=sum(num_tokens))
