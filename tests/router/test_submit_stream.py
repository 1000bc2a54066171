"""Streams between an ingress and its routers over real sockets, with scripted engines: death, silence, refusal."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from certificates import Authority, needs_openssl
from scripted_router import PATIENCE_S, VOCAB_SIZE, ScriptedEngine, answer, scored

from experts.errors import ContextOverflow, InvalidInput, Overloaded
from experts.placement import RouterInfo
from experts.tls import Identity
from router.engine.images import ImageInput
from router.engine.request import Event, FinishEvent, FinishReason, SamplingParams, TokenEvent
from router.grpc_client import RouterPool
from router.grpc_link import Link
from router.grpc_server import RouterServer
from router.resume import Received
from router.wire import router_pb2 as pb
from router.wire import router_pb2_grpc
from router.wire.codec import encode_submit

ROOT = Path(__file__).parents[2]
PROMPT = [7, 11, 13]
HELD = 5
"""Output tokens after which a held engine waits."""


@contextmanager
def served(engine: ScriptedEngine, tls: Identity | None = None) -> Iterator[RouterServer]:
    server = RouterServer(engine, beat_s=0.05, tls=tls)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        engine.stop()


@contextmanager
def child() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A router process that holds every request at HELD tokens, and its address."""
    program = [sys.executable, str(ROOT / "tests/support/scripted_router.py"), str(HELD)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def view(**addresses: str) -> dict[str, RouterInfo]:
    return {name: RouterInfo(name=name, address=address) for name, address in addresses.items()}


def run(
    test: Callable[[RouterPool], Awaitable[None]], *, silence_s: float = PATIENCE_S, tls: Identity | None = None
) -> None:
    """Run a test's coroutine with a pool that is closed after it."""

    async def main() -> None:
        pool = RouterPool(silence_s=silence_s, probe_interval_s=0.05, expiry_grace_s=0.1, tls=tls)
        async with asyncio.timeout(2 * PATIENCE_S), aclosing(pool):
            await test(pool)

    asyncio.run(main())


def submit(
    pool: RouterPool,
    *,
    request_id: str = "r",
    prompt_ids: list[int] | None = None,
    max_tokens: int = 12,
    temperature: float = 0.0,
    timeout_s: float = PATIENCE_S,
) -> AsyncGenerator[Event, None]:
    return pool.submit(
        request_id=request_id,
        prompt_ids=prompt_ids or PROMPT,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=3),
        deadline=time.monotonic() + timeout_s,
    )


async def take(stream: AsyncGenerator[Event, None], count: int) -> list[Event]:
    return [await anext(stream) for _ in range(count)]


async def drain(stream: AsyncGenerator[Event, None]) -> list[Event]:
    return [event async for event in stream]


def whole_answer(request_id: str = "r", prompt_ids: list[int] | None = None, max_tokens: int = 12) -> list[Event]:
    """What a client must see of a request, however many routers it took."""
    tokens = enumerate(answer(prompt_ids or PROMPT, max_tokens))
    return [
        *(TokenEvent(request_id=request_id, index=index, token_id=token) for index, token in tokens),
        FinishEvent(request_id=request_id, reason=FinishReason.LENGTH),
    ]


def test_a_stream_is_all_tokens_in_order_and_one_finish() -> None:
    engine = ScriptedEngine()
    sampling = SamplingParams(
        temperature=0.1, top_k=3, top_p=0.7, seed=2**64 - 5, max_tokens=9, min_tokens=2, ignore_eos=True,
        stop_token_ids=(5, 199_999),
    )  # fmt: skip

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=server.address))
        deadline = time.monotonic() + PATIENCE_S
        stream = pool.submit(request_id="r", prompt_ids=PROMPT, sampling=sampling, deadline=deadline)
        assert await take(stream, 10) == whole_answer(max_tokens=9)
        assert pool.running() == {"a": 0}
        assert await drain(stream) == []
        assert engine.submitted["r", 0].sampling == sampling
        assert engine.submitted["r", 0].deadline == pytest.approx(deadline, abs=PATIENCE_S / 2)

    with served(engine) as server:
        run(scenario)


@needs_openssl
def test_with_tls_strangers_get_no_tokens(tmp_path: Path) -> None:
    ours = Authority(tmp_path / "ours").issue("ours").identity()
    theirs = replace(Authority(tmp_path / "theirs").issue("theirs").identity(), ca=ours.ca)
    engine = ScriptedEngine()

    async def member(pool: RouterPool) -> None:
        pool.connect(view(a=server.address))
        assert await drain(submit(pool)) == whole_answer()

    async def stranger(pool: RouterPool) -> None:
        pool.connect(view(a=server.address))
        [finish] = await drain(submit(pool, request_id="strange", timeout_s=0.5))
        assert isinstance(finish, FinishEvent) and finish.reason is FinishReason.ERROR

    with served(engine, tls=ours) as server:
        run(member, tls=ours)
        for tls in (None, theirs):
            run(stranger, tls=tls)
    assert {request_id for request_id, _ in engine.submitted} == {"r"}


def test_logprobs_priority_and_salt_survive_the_death_of_a_router() -> None:
    first, second = ScriptedEngine(hold_at=HELD), ScriptedEngine()
    sampling = SamplingParams(
        max_tokens=12, seed=3, min_p=0.25, repetition_penalty=1.1, presence_penalty=-0.3, frequency_penalty=0.7,
        logit_bias=((0, -100.0), (VOCAB_SIZE - 1, 1 / 3)), num_logprobs=20,
    )  # fmt: skip
    expected = [scored("r", index, token, 20) for index, token in enumerate(answer(PROMPT, 12))]

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=server_a.address))
        stream = pool.submit(
            request_id="r",
            prompt_ids=PROMPT,
            sampling=sampling,
            deadline=time.monotonic() + PATIENCE_S,
            priority=-7,
            cache_salt="mine",
        )
        assert await take(stream, HELD) == expected[:HELD]
        pool.connect(view(a=server_a.address, b=server_b.address))
        await asyncio.to_thread(first.stop)
        *tokens, finish = await drain(stream)
        assert tokens == expected[HELD:] and isinstance(finish, FinishEvent)
        for engine, key in ((first, ("r", 0)), (second, ("r", 1))):
            submission = engine.submitted[key]
            assert (submission.sampling, submission.priority, submission.cache_salt) == (sampling, -7, "mine")

    with served(first) as server_a, served(second) as server_b:
        run(scenario)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("temperature", pb.Sampling(temperature=float("nan"), top_p=1.0, max_tokens=1)),
        ("top_p", pb.Sampling(max_tokens=1)),
        ("repetition_penalty", pb.Sampling(top_p=1.0, repetition_penalty=0.0, max_tokens=1)),
        ("frequency_penalty", pb.Sampling(top_p=1.0, frequency_penalty=float("-inf"), max_tokens=1)),
        ("stop_token_ids", pb.Sampling(top_p=1.0, stop_token_ids=[VOCAB_SIZE], max_tokens=1)),
        ("logit_bias", pb.Sampling(top_p=1.0, logit_bias=[pb.LogitBias(token_id=2**32 - 1, bias=1.0)], max_tokens=1)),
        ("logprobs", pb.Sampling(top_p=1.0, num_logprobs=21, max_tokens=1)),
    ],
)
def test_bad_sampling_at_the_listener_is_refused(field: str, message: pb.Sampling) -> None:
    with served(ScriptedEngine()) as server, grpc.insecure_channel(server.address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        request = pb.SubmitRequest(request_id="r", prompt_ids=PROMPT, sampling=message, timeout_ms=60_000)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Submit(request, timeout=PATIENCE_S))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(f"{field}: ")


def test_images_reach_every_router_that_gets_the_request() -> None:
    images = [
        ImageInput(digest=bytes([i] * 32), num_tiles=17, pixels=bytes([i]) * (17 * 3 * 336 * 336)) for i in range(8)
    ]
    first, second = ScriptedEngine(hold_at=HELD), ScriptedEngine()

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=server_a.address))
        stream = pool.submit(
            request_id="r",
            prompt_ids=PROMPT,
            sampling=SamplingParams(max_tokens=12, temperature=0.0, seed=3),
            deadline=time.monotonic() + PATIENCE_S,
            images=images,
        )
        assert await take(stream, HELD) == whole_answer()[:HELD]
        pool.connect(view(a=server_a.address, b=server_b.address))
        await asyncio.to_thread(first.stop)
        assert await drain(stream) == whole_answer()[HELD:]
        for engine, key in ((first, ("r", 0)), (second, ("r", 1))):
            assert list(engine.submitted[key].images) == images

    with served(first) as server_a, served(second) as server_b:
        run(scenario)


def test_prompts_that_begin_alike_go_to_one_router_and_others_are_spread() -> None:
    engines = {name: ScriptedEngine() for name in ("a", "b", "c")}

    async def routers_of(pool: RouterPool, begin: int, salt: str = "") -> set[str]:
        """Where four requests with one beginning went."""
        before = {name: set(engine.submitted) for name, engine in engines.items()}
        for end in range(4):
            stream = pool.submit(
                request_id=f"{begin}-{salt}-{end}",
                prompt_ids=[begin] * 64 + [end],
                sampling=SamplingParams(max_tokens=2, temperature=0.0),
                deadline=time.monotonic() + PATIENCE_S,
                cache_salt=salt,
            )
            await drain(stream)
        return {name for name, engine in engines.items() if set(engine.submitted) - before[name]}

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(**{name: server.address for name, server in servers.items()}))
        homes = [await routers_of(pool, begin) for begin in range(10)]
        assert all(len(home) == 1 for home in homes), homes
        assert len(set.union(*homes)) > 1
        salted = [await routers_of(pool, 0, salt) for salt in "uvwxyz"]
        assert len(set.union(*salted)) > 1

    with ExitStack() as stack:
        servers = {name: stack.enter_context(served(engine)) for name, engine in engines.items()}
        run(scenario)


def test_closing_the_stream_stops_the_engine() -> None:
    engine = ScriptedEngine(hold_at=HELD)

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=server.address))
        stream = submit(pool)
        assert await take(stream, HELD) == whole_answer()[:HELD]
        assert pool.running() == {"a": 1}
        await stream.aclose()
        assert pool.running() == {"a": 0}
        await asyncio.to_thread(engine.wait_for, lambda: engine.cancelled == [("r", 0)])

    with served(engine) as server:
        run(scenario)


def test_cancelling_the_reading_task_stops_the_engine() -> None:
    engine = ScriptedEngine(hold_at=0)

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=server.address))
        task = asyncio.create_task(drain(submit(pool)))
        await asyncio.to_thread(engine.wait_for, lambda: ("r", 0) in engine.submitted)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(engine.wait_for, lambda: engine.cancelled == [("r", 0)])

    with served(engine) as server:
        run(scenario)


def test_a_full_router_sends_requests_on_and_full_routers_refuse_them() -> None:
    full, roomy = ScriptedEngine(max_requests=0), ScriptedEngine(max_requests=1, hold_at=HELD)

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=first.address, b=second.address))
        stream = submit(pool, request_id="one")
        assert await take(stream, HELD) == whole_answer("one")[:HELD]
        with pytest.raises(Overloaded) as refusal:
            await drain(submit(pool, request_id="two"))
        assert (refusal.value.what, refusal.value.retry_after_s) == ("the scripted queue is full", 7.0)
        roomy.release()
        assert await drain(stream) == whole_answer("one")[HELD:]

    with served(full) as first, served(roomy) as second:
        run(scenario)


def test_a_listener_refuses_more_streams_than_its_bound() -> None:
    engine = ScriptedEngine(hold_at=0)
    server = RouterServer(engine, max_streams=1)
    server.start()

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=server.address))
        first = asyncio.create_task(drain(submit(pool, request_id="one")))
        await asyncio.to_thread(engine.wait_for, lambda: ("one", 0) in engine.submitted)
        with pytest.raises(Overloaded, match="1 streams"):
            await drain(submit(pool, request_id="two"))
        engine.release()
        assert await first == whole_answer("one")

    run(scenario)
    server.stop()
    engine.stop()


def test_bad_input_keeps_its_type_and_parts_and_harms_nothing() -> None:
    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=server.address))
        with pytest.raises(InvalidInput) as invalid:
            await drain(submit(pool, temperature=-0.5))
        assert (invalid.value.field, invalid.value.value) == ("temperature", -0.5)
        assert invalid.value.rule == "must be at least 0 and finite"
        with pytest.raises(ContextOverflow) as overflow:
            await drain(submit(pool, prompt_ids=[1] * 10_001))
        assert (overflow.value.num_prompt_tokens, overflow.value.max_model_len) == (10_001, 10_000)
        assert await drain(submit(pool)) == whole_answer()

    with served(ScriptedEngine()) as server:
        run(scenario)


def test_a_prompt_longer_than_a_message_is_the_users_mistake() -> None:
    async def scenario(_: RouterPool) -> None:
        async with aclosing(RouterPool(max_message_bytes=1000)) as pool:
            pool.connect(view(a=server.address))
            with pytest.raises(InvalidInput, match="1000 bytes"):
                await drain(submit(pool, prompt_ids=[1] * 2000))

    with served(ScriptedEngine()) as server:
        run(scenario)


def test_a_stream_goes_on_elsewhere_when_its_listener_stops() -> None:
    dying, heir = ScriptedEngine(hold_at=HELD), ScriptedEngine()

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=first.address, b=second.address))
        stream = submit(pool)
        head = await take(stream, HELD)
        await asyncio.to_thread(first.stop)
        assert head + await drain(stream) == whole_answer()
        assert heir.submitted["r", 1].num_prompt == len(PROMPT)
        assert dying.cancelled == [("r", 0)]

    with served(dying) as first, served(heir) as second:
        run(scenario)


def test_a_stream_goes_on_elsewhere_when_its_engine_stops() -> None:
    dying, heir = ScriptedEngine(hold_at=HELD), ScriptedEngine()

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=first.address, b=second.address))
        stream = submit(pool)
        head = await take(stream, HELD)
        await asyncio.to_thread(dying.stop)
        assert head + await drain(stream) == whole_answer()
        assert await drain(submit(pool, request_id="next")) == whole_answer("next")

    with served(dying) as first, served(heir) as second:
        run(scenario)


def test_a_stream_goes_on_elsewhere_when_its_router_is_killed() -> None:
    async def scenario(pool: RouterPool) -> None:
        with child() as (process, address), served(ScriptedEngine()) as heir:
            pool.connect(view(a=address, b=heir.address))
            stream = submit(pool)
            head = await take(stream, HELD)
            process.send_signal(signal.SIGKILL)
            assert head + await drain(stream) == whole_answer()

    run(scenario)


def test_a_stopped_router_loses_its_streams_and_gets_new_ones_once_it_runs_again() -> None:
    async def scenario(pool: RouterPool) -> None:
        with child() as (process, address), served(ScriptedEngine()) as heir:
            pool.connect(view(a=address, b=heir.address))
            stream = submit(pool)
            head = await take(stream, HELD)
            process.send_signal(signal.SIGSTOP)
            assert head + await drain(stream) == whole_answer()
            assert await drain(submit(pool, request_id="next")) == whole_answer("next")
            process.send_signal(signal.SIGCONT)
            pool.connect(view(a=address))
            again = submit(pool, request_id="again", max_tokens=HELD)
            assert await take(again, HELD) == whole_answer("again")[:HELD]
            await again.aclose()

    run(scenario, silence_s=1.0)


def test_a_stream_waits_for_its_only_router_to_come_back_at_another_address() -> None:
    dying, heir = ScriptedEngine(hold_at=HELD), ScriptedEngine()

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=first.address))
        stream = submit(pool)
        head = await take(stream, HELD)
        await asyncio.to_thread(first.stop)
        tail = asyncio.create_task(drain(stream))
        while pool.running() != {"a": 0}:
            await asyncio.sleep(0)
        assert not tail.done()
        await asyncio.to_thread(pool.connect, view(a=second.address))
        assert head + await tail == whole_answer()

    with served(dying) as first, served(heir) as second:
        run(scenario)


def test_a_stream_waits_for_its_only_router_to_come_back_at_the_same_address() -> None:
    dying, heir = ScriptedEngine(hold_at=HELD), ScriptedEngine()

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=first.address))
        stream = submit(pool)
        head = await take(stream, HELD)
        await asyncio.to_thread(first.stop)
        tail = asyncio.create_task(drain(stream))
        while pool.running() != {"a": 0}:
            await asyncio.sleep(0)
        second = RouterServer(heir, ports=range(first.port, first.port + 1))
        second.start()
        assert head + await tail == whole_answer()
        await asyncio.to_thread(second.stop)

    with served(dying) as first:
        run(scenario)
    heir.stop()


def test_a_request_may_come_before_the_first_router() -> None:
    async def scenario(pool: RouterPool) -> None:
        task = asyncio.create_task(drain(submit(pool)))
        await asyncio.sleep(0)
        pool.connect(view(a=server.address))
        assert await task == whole_answer()

    with served(ScriptedEngine()) as server:
        run(scenario)


def test_routers_that_are_not_ready_get_no_requests() -> None:
    leaving = ScriptedEngine()

    async def scenario(pool: RouterPool) -> None:
        draining = RouterInfo(name="a", address=first.address, state="draining")
        pool.connect({"a": draining, **view(b=second.address)})
        assert await drain(submit(pool)) == whole_answer()
        assert leaving.submitted == {}

    with served(leaving) as first, served(ScriptedEngine()) as second:
        run(scenario)


def test_a_router_that_leaves_the_view_ends_what_it_began() -> None:
    engine = ScriptedEngine(hold_at=HELD)

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=server.address))
        stream = submit(pool)
        head = await take(stream, HELD)
        pool.connect({})
        while pool.running() != {}:
            await asyncio.sleep(0)
        engine.release()
        assert head + await drain(stream) == whole_answer()
        assert list(engine.submitted) == [("r", 0)]

    with served(engine) as server:
        run(scenario)


def test_without_a_router_the_deadline_ends_a_request() -> None:
    async def scenario(pool: RouterPool) -> None:
        [finish] = await drain(submit(pool, timeout_s=0.05))
        assert isinstance(finish, FinishEvent)
        assert (finish.reason, finish.code) == (FinishReason.ERROR, "router_unavailable")

    run(scenario)


def test_an_engine_that_ignores_the_deadline_is_cut_off() -> None:
    engine = ScriptedEngine(hold_at=0)

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=server.address))
        [finish] = await drain(submit(pool, timeout_s=1.0))
        assert isinstance(finish, FinishEvent)
        assert (finish.reason, finish.code) == (FinishReason.ERROR, "deadline_exceeded")
        await asyncio.to_thread(engine.wait_for, lambda: engine.cancelled == [("r", 0)])

    with served(engine) as server:
        run(scenario)


def test_closing_the_pool_ends_its_requests() -> None:
    engine = ScriptedEngine(hold_at=HELD)

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=server.address))
        stream = submit(pool)
        await take(stream, HELD)
        tail = asyncio.create_task(drain(stream))
        waiting = asyncio.create_task(drain(submit(pool, request_id="next")))
        await asyncio.to_thread(engine.wait_for, lambda: ("next", 0) in engine.submitted)
        await pool.aclose()
        for ended in (await tail, await waiting, await drain(submit(pool, request_id="late"))):
            assert isinstance(ended[-1], FinishEvent)
            assert ended[-1].code == "router_unavailable"

    with served(engine) as server:
        run(scenario)


def test_a_request_ends_when_the_last_router_of_a_draining_cluster_gives_it_up() -> None:
    engine = ScriptedEngine(hold_at=HELD)

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=server.address))
        stream = submit(pool)
        assert await take(stream, HELD) == whole_answer()[:HELD]
        tail = asyncio.create_task(drain(stream))
        pool.connect(view(a=server.address), draining=True)
        await asyncio.to_thread(engine.stop)
        pool.connect({}, draining=True)
        (ended,) = await tail
        assert isinstance(ended, FinishEvent)
        assert ended.code == "router_unavailable"

    with served(engine) as server:
        run(scenario)


def test_many_streams_are_spread_and_whole_when_one_router_dies() -> None:
    dying, heir = ScriptedEngine(hold_at=HELD), ScriptedEngine(hold_at=HELD)
    prompts = {f"r{number}": [number, *PROMPT] for number in range(64)}

    async def one(pool: RouterPool, request_id: str) -> list[Event]:
        return await drain(submit(pool, request_id=request_id, prompt_ids=prompts[request_id], max_tokens=40))

    async def scenario(pool: RouterPool) -> None:
        pool.connect(view(a=first.address, b=second.address))
        tasks = {name: asyncio.create_task(one(pool, name)) for name in prompts}
        await asyncio.to_thread(dying.wait_for, lambda: len(dying.submitted) == 32)
        await asyncio.to_thread(heir.wait_for, lambda: len(heir.submitted) == 32)
        assert pool.running() == {"a": 32, "b": 32}
        await asyncio.to_thread(first.stop)
        heir.release()
        for name, task in tasks.items():
            assert await task == whole_answer(name, prompts[name], 40)

    with served(dying) as first, served(heir) as second:
        run(scenario)


def raw_request() -> pb.SubmitRequest:
    sampling = SamplingParams(max_tokens=1)
    return encode_submit(
        request_id="r", attempt=0, prompt_ids=PROMPT, emitted_ids=[], sampling=sampling, timeout_s=PATIENCE_S
    )


def channel_to(server: RouterServer) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(server.address, [("grpc.enable_http_proxy", 0)])


def test_a_retired_link_closes_with_its_last_call() -> None:
    async def scenario() -> None:
        link = Link(
            name="a",
            address=server.address,
            silence_s=PATIENCE_S,
            probe_interval_s=0.05,
            max_message_bytes=1 << 20,
            on_change=lambda: None,
        )
        call = link.open(raw_request(), PATIENCE_S)
        link.retire()
        assert await call.read() == Received()
        call.close()
        await asyncio.sleep(0)
        with pytest.raises(grpc.aio.UsageError, match="closed"):
            link.open(raw_request(), PATIENCE_S)
        await link.aclose()

    with served(ScriptedEngine(hold_at=0)) as server:
        asyncio.run(scenario())


def test_an_idle_stream_has_a_clear_end() -> None:
    async def scenario() -> None:
        async with channel_to(server) as channel:
            call = router_pb2_grpc.RouterServiceStub(channel).Submit(raw_request())
            response = await call.read()
            assert not response.tokens and not response.HasField("finish")
            stopping = asyncio.create_task(asyncio.to_thread(server.stop))
            with pytest.raises(grpc.aio.AioRpcError, match="this router stops"):
                while True:
                    await call.read()
            await stopping

    with served(ScriptedEngine(hold_at=0)) as server:
        asyncio.run(scenario())


def test_a_listener_without_an_engine_ends_its_beats() -> None:
    engine = ScriptedEngine()

    async def scenario() -> None:
        async with channel_to(server) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            beats = stub.Beat(pb.BeatRequest())
            for _ in range(3):
                await beats.read()
            engine.stop()
            with pytest.raises(grpc.aio.AioRpcError, match="this router is stopping"):
                await stub.Submit(raw_request()).read()
            with pytest.raises(grpc.aio.AioRpcError, match="takes no requests any more"):
                while True:
                    await beats.read()

    with served(engine) as server:
        asyncio.run(scenario())


def test_a_taken_port_is_an_error_and_a_range_is_searched() -> None:
    engine = ScriptedEngine()
    with served(engine) as first, ExitStack() as stack:
        with pytest.raises(InvalidInput, match=f"{first.port}-{first.port}"):
            RouterServer(engine, ports=range(first.port, first.port + 1)).start()
        second = RouterServer(engine, ports=range(first.port, min(first.port + 50, 65536)))
        stack.callback(second.stop)
        second.start()
        assert second.port > first.port


def test_a_server_that_never_started_can_be_stopped() -> None:
    engine = ScriptedEngine()
    RouterServer(engine).stop()
    engine.stop()
