"""Drives an engine with prompts all at once, and says when their tokens came."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from experts.errors import InvalidInput
from router.engine.engine import Engine
from router.engine.request import Event, FinishEvent, SamplingParams, TokenEvent

TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds: from the start until everyone had a first token, and from there until the first had its last one.
    `num_decoded` tokens came in the latter."""

    prefill_s: float
    decode_s: float
    num_decoded: int


def check_room(engine: Engine, prompt: int, output: int) -> None:
    """Raises InvalidInput for lengths that answers of `output` tokens would not reach."""
    most = engine.max_model_len - output
    if prompt > most:
        raise InvalidInput("prompt", prompt, f"must be at most {most}, so that {output} more tokens fit the context")


def drive(
    engine: Engine,
    prompts: Sequence[list[int]],
    output: int,
    hold: AbstractContextManager[object],
    on_all_begun: Callable[[], None] = lambda: None,
) -> Times:
    """Greedy answers of `output` tokens to all prompts. Within `hold` no step runs, so that all begin together;
    `on_all_begun` is called when everyone has a first token."""
    arrived: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
    started = time.perf_counter()
    with hold:
        for number, ids in enumerate(prompts):
            _submit(engine, f"{started}-{number}", ids, output, arrived)
    tokens: dict[str, list[float]] = {}
    num_finished = 0
    while num_finished < len(prompts):
        at, event = arrived.get(timeout=TIMEOUT_S)
        if isinstance(event, FinishEvent):
            assert len(tokens.get(event.request_id, ())) == output, event
            num_finished += 1
        elif isinstance(event, TokenEvent):
            is_first = event.request_id not in tokens
            tokens.setdefault(event.request_id, []).append(at)
            if is_first and len(tokens) == len(prompts):
                on_all_begun()
    begin, end = max(times[0] for times in tokens.values()), min(times[-1] for times in tokens.values())
    return Times(
        prefill_s=begin - started,
        decode_s=max(0.0, end - begin),
        num_decoded=sum(begin < at <= end for times in tokens.values() for at in times),
    )


def _submit(
    engine: Engine, name: str, ids: list[int], output: int, arrived: queue.SimpleQueue[tuple[float, Event]]
) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    deadline = time.monotonic() + TIMEOUT_S

    def note(event: Event) -> None:
        arrived.put((time.perf_counter(), event))

    # With a salt of its own, nothing is found of what earlier runs computed.
    engine.submit(name, 0, ids, [], sampling, deadline, note, cache_salt=name)
