"""The answers of one HTTP request, running side by side, and the pieces of all of them in the order they came.

Knows nothing of HTTP. Leaving its block ends all answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType

from router.api.answer import Piece

MAX_HELD = 256
"""Pieces that wait for a slow reader; then the answers wait."""
CANCEL_TIMEOUT_S = 10.0

Item = tuple[int, Piece]
"""(index of the answer, its piece)."""


class RunningAnswers:
    """Runs answers between `async with` and its end. One reader takes `pieces` until `num_open` is 0."""

    def __init__(self, answers: Sequence[AsyncGenerator[Piece, None]]) -> None:
        self.num_open = len(answers)
        """Answers whose last piece was not taken yet."""
        self._answers = answers
        self._tasks: list[asyncio.Task[None]] = []
        self._items: asyncio.Queue[Item | Exception] = asyncio.Queue(MAX_HELD)
        self._error: Exception | None = None

    async def __aenter__(self) -> RunningAnswers:
        self._tasks = [
            asyncio.create_task(self._run(index, answer), name=f"answer {index}")
            for index, answer in enumerate(self._answers)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        # Bounded: a backend that does not let go must not hold the client's connection.
        await asyncio.wait(self._tasks, timeout=CANCEL_TIMEOUT_S)

    async def pieces(self, timeout_s: float) -> list[Item]:
        """All pieces that are there, at least one; none when nothing came for `timeout_s`.

        Raises the error of the first answer that failed, after the pieces that came before it.
        """
        if self._error is not None:
            raise self._error
        try:
            async with asyncio.timeout(timeout_s):
                first = await self._items.get()
        except TimeoutError:
            return []
        items = self._take(first)
        if not items and self._error is not None:
            raise self._error
        self.num_open -= sum(piece.finish is not None for _, piece in items)
        return items

    def _take(self, first: Item | Exception) -> list[Item]:
        items: list[Item] = []
        item = first
        while not isinstance(item, Exception):
            items.append(item)
            if self._items.empty():
                return items
            item = self._items.get_nowait()
        self._error = item
        return items

    async def _run(self, index: int, answer: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(answer):
                async for piece in answer:
                    await self._items.put((index, piece))
        except Exception as error:
            await self._items.put(error)
