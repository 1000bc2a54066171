"""The engine under a closed loop: so many clients, each of which asks again as soon as it has its answer.

What a server reaches over HTTP under the same load is measured against this.
"""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from cluster.config import ServeSettings
from cluster.local import build_engine, load_local_experts, open_model
from cluster.measure.drive import TIMEOUT_S, check_room
from cluster.topology import Role, needs
from experts.errors import InvalidInput
from router.engine.engine import Engine
from router.engine.request import Event, FinishEvent, SamplingParams, TokenEvent

SEED = 20240
WARM_UP_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """Output tokens per second over the whole run, and what a client sees, in milliseconds."""

    concurrency: int
    requests: int
    prompt: int
    output: int
    output_tokens_per_s: float
    ttft_p50_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


@dataclass
class _Seen:
    """When a request was sent, and when its tokens came."""

    sent: float
    tokens: list[float] = field(default_factory=list)


def bench_loop(settings: ServeSettings, concurrency: int, requests: int, prompt: int, output: int) -> LoopResult:
    """Run `requests` requests, experts in this process, after as many as there are clients to warm up.

    Raises InvalidInput for answers that have no gaps between tokens or do not fit the context.
    """
    if output < 2:
        raise InvalidInput("output", output, "must be at least 2: one token alone has no gap to the next")
    model = open_model(settings.model_dir, settings.dtype)
    torch.set_num_threads(needs(settings, Role.ROUTER).threads)
    engine = build_engine(model, settings, load_local_experts(model, settings), lambda _missing: True)
    generator = torch.Generator().manual_seed(SEED)
    count = requests + concurrency
    prompts = torch.randint(0, model.config.vocab_size, (count, prompt), generator=generator).tolist()
    check_room(engine, prompt, max(output, WARM_UP_TOKENS))
    engine.start()
    try:
        _run(engine, prompts[:concurrency], concurrency, WARM_UP_TOKENS)
        started = time.perf_counter()
        seen = _run(engine, prompts[concurrency:], concurrency, output)
        elapsed_s = time.perf_counter() - started
    finally:
        engine.stop()
    gaps = sorted(b - a for one in seen for a, b in zip(one.tokens, one.tokens[1:], strict=False))
    return LoopResult(
        concurrency=concurrency,
        requests=requests,
        prompt=prompt,
        output=output,
        output_tokens_per_s=round(sum(len(one.tokens) for one in seen) / elapsed_s, 1),
        ttft_p50_ms=round(statistics.median(one.tokens[0] - one.sent for one in seen) * 1e3, 1),
        itl_p50_ms=round(gaps[len(gaps) // 2] * 1e3, 1),
        itl_p99_ms=round(gaps[len(gaps) * 99 // 100] * 1e3, 1),
    )


def _run(engine: Engine, prompts: Sequence[list[int]], concurrency: int, output: int) -> list[_Seen]:
    arrived: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
    seen: dict[str, _Seen] = {}
    waiting = iter(enumerate(prompts))
    for _ in range(concurrency):
        _send_next(engine, waiting, output, seen, arrived)
    num_finished = 0
    while num_finished < len(prompts):
        at, event = arrived.get(timeout=TIMEOUT_S)
        if isinstance(event, TokenEvent):
            seen[event.request_id].tokens.append(at)
        elif isinstance(event, FinishEvent):
            assert len(seen[event.request_id].tokens) == output, event
            num_finished += 1
            _send_next(engine, waiting, output, seen, arrived)
    return list(seen.values())


def _send_next(
    engine: Engine,
    waiting: Iterator[tuple[int, list[int]]],
    output: int,
    seen: dict[str, _Seen],
    arrived: queue.SimpleQueue[tuple[float, Event]],
) -> None:
    number, ids = next(waiting, (0, []))
    if not ids:
        return
    name, now = f"loop-{output}-{number}", time.perf_counter()
    seen[name] = _Seen(sent=now)
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    deadline = time.monotonic() + TIMEOUT_S
    engine.submit(name, 0, ids, [], sampling, deadline, lambda event: arrived.put((time.perf_counter(), event)))
