"""The load of a drill: streams that are asked for again and again, and everything their clients saw."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.drill.verdict import Told
from cluster.load.client import Answered, Client

PAUSE_S = 0.05
"""Before a client asks again after a failure, so that a dead server is not stormed."""


def bodies(model: str, prompts: Sequence[Sequence[int]], output: int) -> list[bytes]:
    """Streams of `output` tokens, greedy, whatever the model wants to end."""
    fixed = {"model": model, "max_tokens": output, "temperature": 0, "ignore_eos": True, "stream": True}
    usage = {"stream_options": {"include_usage": True}}
    return [json.dumps({**fixed, **usage, "prompt": list(prompt)}).encode() for prompt in prompts]


@dataclass(eq=False)
class Load:
    """One stream at a time of each of `bodies`, on `client`. `expected` are the texts that they give without faults."""

    client: Client
    bodies: Sequence[bytes]
    expected: dict[int, str] = field(default_factory=dict)
    told: list[Told] = field(default_factory=list)
    _ending: bool = False

    async def learn(self) -> None:
        """Ask for each once, one after the other, to know the answers. Raises ValueError where one fails."""
        for prompt, body in enumerate(self.bodies):
            outcome = await self.client.send(body)
            if not isinstance(outcome, Answered):
                raise ValueError(f"{outcome.kind}: {outcome.message}")
            self.expected[prompt] = outcome.text

    async def run(self) -> None:
        """Until `end` is called; streams under way are read to their end."""
        async with asyncio.TaskGroup() as group:
            for prompt in range(len(self.bodies)):
                group.create_task(self._ask(prompt))

    def end(self) -> None:
        """Begin no more requests."""
        self._ending = True

    async def _ask(self, prompt: int) -> None:
        while not self._ending:
            sent = time.perf_counter()
            outcome = await self.client.send(self.bodies[prompt])
            if isinstance(outcome, Answered):
                equal = outcome.text == self.expected[prompt]
                times, ended = outcome.times, outcome.ended
                self.told.append(Told(prompt=prompt, sent=sent, times=times, ended=ended, equal=equal))
                continue
            problem = f"{outcome.kind}: {outcome.message}"
            ended = time.perf_counter()
            self.told.append(
                Told(prompt=prompt, sent=sent, times=outcome.times, ended=ended, problem=problem, kind=outcome.kind)
            )
            await asyncio.sleep(PAUSE_S)
