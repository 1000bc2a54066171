"""The engine's thread around the scheduler: every request one terminal event, whatever runner and experts do."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import pytest

from experts.errors import ContextOverflow, InvalidInput, RouterLost
from experts.placement import ExpertKey
from router.engine.engine import Engine
from router.engine.kv_cache import KVCache, KVLayout
from router.engine.request import Event, FinishEvent, FinishReason, SamplingParams, TokenEvent, TokenLogprobs
from router.engine.runner import StepOutcome
from router.engine.scheduler import Scheduler, SchedulerConfig, Step

EOS = 99
FAR = 3600.0


class Counting:
    """A runner whose next token is the last one plus one; requests holding a token ≥ 50 need expert (0, 0)."""

    def __init__(self) -> None:
        self.away = threading.Event()
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False
        self.speechless = -1
        self.looked = threading.Event()

    def run(self, step: Step) -> StepOutcome:
        self.entered.release()
        assert self.gate.wait(timeout=30)
        if self.fails:
            raise RuntimeError("a bug")
        sampled, lost, failed = {}, {}, set()
        for piece in step.pieces:
            if self.away.is_set() and max(piece.request.token_ids) >= 50:
                lost[piece.request.request_id] = frozenset({(0, 0)})
            elif piece.request.token_ids[0] == self.speechless:
                failed.add(piece.request.request_id)
            elif piece.samples:
                sampled[piece.request.request_id] = piece.request.token_ids[-1] + 1
        asked = {piece.request.request_id for piece in step.pieces if piece.request.sampling.num_logprobs is not None}
        logprobs = {name: TokenLogprobs(logprob=-float(sampled[name])) for name in sampled if name in asked}
        return StepOutcome(sampled=sampled, lost=lost, failed=frozenset(failed), logprobs=logprobs)

    def available(self, missing: frozenset[ExpertKey]) -> bool:
        self.looked.set()
        return not self.away.is_set()


class Client:
    """Collects one request's events."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def __call__(self, event: Event) -> None:
        self.events.put(event)

    def next(self) -> Event:
        return self.events.get(timeout=30)

    def rest(self) -> tuple[list[int], FinishEvent]:
        tokens = []
        while isinstance(event := self.next(), TokenEvent):
            tokens.append(event.token_id)
        assert self.events.empty()
        return tokens, event


@pytest.fixture
def runner() -> Counting:
    return Counting()


@pytest.fixture
def engine(runner: Counting):  # type: ignore[no-untyped-def]
    layout = KVLayout(
        block_size=4, num_global_blocks=64, num_local_blocks=16, chunk_size=8, has_global=True, has_local=True
    )
    config = SchedulerConfig(
        max_batch_tokens=16, max_running=8, max_waiting=8, max_waiting_tokens=1000, max_model_len=100,
        eos_ids=frozenset({EOS}),
    )  # fmt: skip
    engine = Engine(
        scheduler=Scheduler(KVCache(layout), config), runner=runner, vocab_size=100, available=runner.available
    )
    engine.start()
    yield engine
    runner.gate.set()
    engine.stop()
    assert not engine.alive


def ask(engine: Engine, name: str, prompt: list[int], emitted: tuple[int, ...] = (), **sampling: int) -> Client:
    client = Client()
    engine.submit(
        name, 0, prompt, list(emitted), SamplingParams(**{"max_tokens": 5, **sampling}), time.monotonic() + FAR, client
    )
    return client


def test_logprobs_come_with_the_tokens_that_asked(engine: Engine) -> None:
    asking, silent = ask(engine, "a", [1], num_logprobs=0, max_tokens=2), ask(engine, "b", [1], max_tokens=2)
    for client, expected in (
        (asking, [TokenLogprobs(logprob=-2.0), TokenLogprobs(logprob=-3.0)]),
        (silent, [None] * 2),
    ):
        events = [client.next() for _ in range(3)]
        assert [event.logprobs for event in events if isinstance(event, TokenEvent)] == expected


def test_sampling_that_cannot_be_followed_is_refused_at_submission(engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="stop_token_ids: token ids must be in 0 … 99"):
        engine.submit(
            "a", 0, [1], [], SamplingParams(max_tokens=5, stop_token_ids=(100,)), time.monotonic() + FAR, Client()
        )
    with pytest.raises(InvalidInput, match="temperature: "):
        engine.submit("a", 0, [1], [], SamplingParams(max_tokens=5, temperature=-1.0), time.monotonic() + FAR, Client())
    assert ask(engine, "a", [1]).rest()[0] == [2, 3, 4, 5, 6]


def test_counts_to_max_tokens(engine: Engine) -> None:
    tokens, finish = ask(engine, "a", [1, 2, 3]).rest()
    assert tokens == [4, 5, 6, 7, 8]
    assert finish == FinishEvent(request_id="a", reason=FinishReason.LENGTH)


def test_end_token_stops(engine: Engine) -> None:
    tokens, finish = ask(engine, "a", [96], max_tokens=50).rest()
    assert (tokens, finish.reason) == ([97, 98, 99], FinishReason.STOP)


def test_resumed_request_continues_its_indices(engine: Engine) -> None:
    client = ask(engine, "a", [1, 2], emitted=(3, 4), max_tokens=4)
    event = client.next()
    assert event == TokenEvent(request_id="a", index=2, token_id=5)
    assert client.rest()[0] == [6]


def test_resumed_request_that_had_ended(engine: Engine) -> None:
    assert ask(engine, "a", [1], emitted=(2, 3), max_tokens=2).rest() == (
        [],
        FinishEvent(request_id="a", reason=FinishReason.LENGTH),
    )


def test_counts_and_durations_are_of_what_was_served(engine: Engine, runner: Counting) -> None:
    for name in ("a", "b"):
        ask(engine, name, [1, 2, 3]).rest()
    with pytest.raises(InvalidInput):
        ask(engine, "c", [100])
    with pytest.raises(ContextOverflow):
        ask(engine, "d", [1] * 100)
    engine.stop()
    stats, durations = engine.stats, engine.stats.durations
    assert (stats.prompt_tokens, stats.output_tokens, stats.finished[FinishReason.LENGTH]) == (6, 10, 2)
    assert dict(stats.rejected) == {"InvalidInput": 1, "ContextOverflow": 1}
    assert sum(stats.batch.counts) == stats.steps
    assert stats.batch.total == 10, "each step had one request"
    counted = [sum(one.counts) for one in (durations.queue, durations.first_token, durations.between_tokens)]
    assert (counted, sum(durations.whole.counts)) == ([2, 2, 8], 2)
    assert durations.queue.total <= durations.first_token.total <= durations.whole.total
    assert engine.longest_wait_s() == 0.0


def test_bad_token_id_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="token ids must be in"):
        ask(engine, "a", [1, 100])


def test_lost_expert_parks_only_its_own_request(engine: Engine, runner: Counting) -> None:
    runner.away.set()
    parked = ask(engine, "parked", [60])
    other = ask(engine, "other", [1], max_tokens=20)
    assert other.rest()[0] == list(range(2, 22))
    assert parked.events.empty()
    assert engine.load() == (0, 0, 1)
    runner.away.clear()
    engine.wake()
    assert parked.rest()[0] == [61, 62, 63, 64, 65]


def test_parked_request_ends_at_its_deadline(engine: Engine, runner: Counting) -> None:
    runner.away.set()
    client = Client()
    engine.submit("a", 0, [60], [], SamplingParams(max_tokens=5), time.monotonic() + 0.2, client)
    tokens, finish = client.rest()
    assert tokens == []
    assert (finish.reason, finish.code) == (FinishReason.ERROR, "expert_unavailable")


def test_cancel_is_the_last_event(engine: Engine, runner: Counting) -> None:
    runner.gate.clear()
    client = ask(engine, "a", [1], max_tokens=50)
    assert runner.entered.acquire(timeout=30)
    engine.cancel("a", 0)
    runner.gate.set()
    tokens, finish = client.rest()
    assert len(tokens) <= 1
    assert finish.reason is FinishReason.CANCELLED


def test_cancel_of_an_older_attempt_leaves_the_newer(engine: Engine, runner: Counting) -> None:
    runner.gate.clear()
    old = ask(engine, "a", [1], max_tokens=50)
    new = Client()
    engine.submit("a", 1, [1], [2], SamplingParams(max_tokens=3), time.monotonic() + FAR, new)
    engine.cancel("a", 0)
    runner.gate.set()
    assert new.rest()[0] == [3, 4]
    assert old.rest()[1].reason is FinishReason.CANCELLED


def test_a_bug_in_a_step_ends_its_requests_only(engine: Engine, runner: Counting) -> None:
    runner.fails = True
    tokens, finish = ask(engine, "a", [1]).rest()
    assert (tokens, finish.reason, finish.code) == ([], FinishReason.ERROR, "internal_error")
    runner.fails = False
    assert len(ask(engine, "b", [1]).rest()[0]) == 5


def test_a_request_without_a_possible_token_ends_alone(engine: Engine, runner: Counting) -> None:
    runner.speechless = 7
    clients = [ask(engine, str(first), [first], max_tokens=20) for first in (6, 7, 8)]
    assert [len(client.rest()[0]) for client in (clients[0], clients[2])] == [20, 20]
    assert clients[1].rest()[1].code == "model_error"


def test_too_many_bugs_end_the_engine(engine: Engine, runner: Counting) -> None:
    runner.fails = True
    for number in range(5):
        assert ask(engine, str(number), [1]).rest()[1].code == "internal_error"
    engine.stop()
    with pytest.raises(RouterLost):
        ask(engine, "late", [1])


def test_stop_ends_every_request_once(engine: Engine, runner: Counting) -> None:
    runner.gate.clear()
    clients = [ask(engine, str(number), [number + 1], max_tokens=90) for number in range(4)]
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    runner.gate.set()
    stopper.join(timeout=30)
    for client in clients:
        finish = client.rest()[1]
        assert finish.code in ("router_unavailable", "")


def test_a_listener_that_raises_harms_nobody(engine: Engine) -> None:
    def broken(event: Event) -> None:
        raise ValueError(event)

    submit: Callable[..., None] = engine.submit
    submit("broken", 0, [1], [], SamplingParams(max_tokens=3), time.monotonic() + FAR, broken)
    assert len(ask(engine, "fine", [1], max_tokens=20).rest()[0]) == 20


def test_an_engine_without_work_looks_at_its_hosts_all_the_same(engine: Engine, runner: Counting) -> None:
    for _ in range(2):
        runner.looked.clear()
        assert runner.looked.wait(timeout=30)
