"""Measures the engine without Ray or HTTP: prefill and decode speed of one router, with its experts here or on hosts.

Random distinct prompts, greedy, end tokens ignored. Prefill is timed from submission to the last request's first token,
decode from there to the end, so both are rates of full batches.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from cluster.config import ServeSettings
from cluster.control.pack import pack
from cluster.grpc_echo import echo_main, echo_stream
from cluster.local import Model, build_engine, choose_products, load_local_experts, open_model
from cluster.topology import Role, needs
from experts.ffn import ExpertWeights
from experts.host import ExpertHost
from experts.placement import ClusterView, ExpertKey, HostInfo, Placement
from experts.transport.base import Segment, Shipment
from experts.transport.grpc_client import GrpcTransport
from experts.transport.grpc_server import serve_expert_host
from experts.wire.codec import LinkTerms
from router.dispatch import DispatchStats, RemoteExperts
from router.engine.engine import Engine
from router.engine.request import Event, FinishEvent, SamplingParams, TokenEvent

TIMEOUT_S = 600.0
SEED = 20240


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    """One row of the engine's bench. `step_ms` is the mean decode step, `dispatch_us` the mean wait for the rows of one
    layer that were still under way when the shared expert was done (0 without hosts)."""

    transport: str
    hosts: int
    batch: int
    prompt: int
    output: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    step_ms: float
    dispatch_us: float


def bench_engine(
    settings: ServeSettings, batches: Sequence[int], prompts: Sequence[int], output: int
) -> list[EngineResult]:
    """Measure every combination of batch and prompt length on one engine, after one small warm-up each."""
    model = open_model(settings.model_dir, settings.dtype)
    torch.set_num_threads(needs(settings, Role.ROUTER).threads)
    results = []
    with engine_of(model, settings) as (engine, stats):
        for prompt in prompts:
            for batch in batches:
                _run(engine, model, batch, prompt, output=4, seed=SEED)
                results.append(_measure(engine, model, settings, stats, batch, prompt, output))
    return results


def _measure(
    engine: Engine, model: Model, settings: ServeSettings, stats: DispatchStats, batch: int, prompt: int, output: int
) -> EngineResult:
    waited, dispatches = stats.wait_s, stats.dispatches
    prefill_s, decode_s, num_decoded = _run(engine, model, batch, prompt, output, seed=SEED + 1)
    dispatched = stats.dispatches - dispatches
    return EngineResult(
        transport=settings.transport,
        hosts=settings.hosts if settings.transport == "grpc" else 0,
        batch=batch,
        prompt=prompt,
        output=output,
        prefill_tokens_per_s=round(batch * prompt / prefill_s, 1),
        decode_tokens_per_s=round(num_decoded / decode_s, 1),
        step_ms=round(decode_s * 1e3 * batch / num_decoded, 2),
        dispatch_us=round((stats.wait_s - waited) * 1e6 / dispatched, 1) if dispatched else 0.0,
    )


def _run(engine: Engine, model: Model, batch: int, prompt: int, output: int, seed: int) -> tuple[float, float, int]:
    """Seconds until everyone had a first token, seconds from there to the end, and tokens decoded in those."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).tolist()
    arrived: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    started = time.perf_counter()
    for number, ids in enumerate(prompts):
        engine.submit(
            f"{seed}-{prompt}-{batch}-{output}-{number}",
            0,
            ids,
            [],
            sampling,
            time.monotonic() + TIMEOUT_S,
            lambda event: arrived.put((time.perf_counter(), event)),
        )
    first: dict[str, float] = {}
    times, finished = [], 0
    while finished < batch:
        at, event = arrived.get(timeout=TIMEOUT_S)
        if isinstance(event, TokenEvent):
            first.setdefault(event.request_id, at)
            times.append(at)
        elif isinstance(event, FinishEvent):
            finished += 1
    begin = max(first.values())
    return begin - started, max(times) - begin, sum(at > begin for at in times)


@contextmanager
def engine_of(model: Model, settings: ServeSettings) -> Iterator[tuple[Engine, DispatchStats]]:
    """A running engine and the counters of its dispatches; host processes end with it."""
    if settings.transport == "local":
        engine = build_engine(model, settings, load_local_experts(model, settings), lambda _missing: True)
        with _running(engine):
            yield engine, DispatchStats()
        return
    with host_processes(model, settings) as view:
        transport = GrpcTransport(router_name="bench", terms=model.terms())
        remote = RemoteExperts(transport)
        remote.connect(view)
        _await_links(remote, len(view.hosts))
        engine = build_engine(model, settings, remote, remote.available)
        with _running(engine):
            yield engine, remote.stats
        transport.close()


@contextmanager
def _running(engine: Engine) -> Iterator[None]:
    engine.start()
    try:
        yield
    finally:
        engine.stop()


def _await_links(remote: RemoteExperts, num_hosts: int) -> None:
    give_up = time.monotonic() + 60
    while len(remote.transport.linked()) < num_hosts:
        assert time.monotonic() < give_up, "a host process did not answer"
        time.sleep(0.01)


@contextmanager
def host_processes(model: Model, settings: ServeSettings) -> Iterator[ClusterView]:
    """Expert hosts as plain child processes on the loopback, loaded; the view that names them."""
    placement = pack(
        layers=model.config.moe_layers,
        num_experts=model.config.num_experts,
        hosts=settings.host_names,
        num_replicas=settings.replicas,
    )
    shares = {name: [key for key, holders in placement.items() if name in holders] for name in settings.host_names}
    with ExitStack() as stack:
        starting = {
            name: stack.enter_context(child(_host_main, name, settings, share)) for name, share in shares.items()
        }
        hosts = {
            name: HostInfo(name=name, incarnation=1, address=address_from(pipe), state="ready")
            for name, pipe in starting.items()
        }
        yield ClusterView(version=1, placement=Placement(epoch=1, replicas=placement), hosts=hosts)


@contextmanager
def child(main: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A process that runs `main(pipe, *arguments)` and is told to end by the closing of the pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(timeout=10)
        process.kill()


def address_from(pipe: Connection) -> str:
    """What a child says when it listens."""
    assert pipe.poll(TIMEOUT_S), "a child process did not start"
    address: str = pipe.recv()
    return address


def _host_main(pipe: Connection, name: str, settings: ServeSettings, keys: Sequence[ExpertKey]) -> None:
    """A host process: load, listen, say where, and end when the parent's end of the pipe closes."""
    torch.set_num_threads(needs(settings, Role.HOST).threads)
    model = open_model(settings.model_dir, settings.dtype)
    host = ExpertHost(name, model.store(), choose_products(model, settings))
    for key in keys:
        host.load(key)
    _serve_until_closed(pipe, host, model.terms())


@dataclass(frozen=True, kw_only=True)
class DispatchResult:
    """Round trips of one block of rows to a host process that computes next to nothing, and of the same bytes over a
    bare gRPC stream. Microseconds."""

    rows: int
    hidden: int
    dispatch_p50_us: float
    dispatch_p99_us: float
    echo_p50_us: float
    echo_p99_us: float


def bench_dispatch(hidden: int = 1024, rows: Sequence[int] = (1, 32, 256), rounds: int = 1000) -> list[DispatchResult]:
    """Measure send → poll of one shipment of bfloat16 rows, and the bare echo, in turns on the same machine."""
    torch.set_num_threads(1)
    terms = LinkTerms(checkpoint_digest="bench", dtype=torch.bfloat16, hidden_size=hidden)
    results = []
    with child(_trivial_host_main, terms) as host, child(echo_main) as echo:
        transport = GrpcTransport(router_name="bench", terms=terms)
        transport.connect({"host": HostInfo(name="host", incarnation=1, address=address_from(host))})
        give_up = time.monotonic() + 60
        while not transport.linked():
            assert time.monotonic() < give_up, "the host did not answer"
            time.sleep(0.01)
        with echo_stream(address_from(echo)) as round_trip:
            for count in rows:
                rows_TH = torch.randn(count, hidden).bfloat16()
                message = rows_TH.view(torch.uint8).numpy().tobytes()
                shipment = Shipment(segments=(Segment(layer=0, expert=0, num_rows=count),), rows_TH=rows_TH)
                ours = _microseconds(partial(_there_and_back, transport, shipment), rounds)
                bare = _microseconds(partial(round_trip, message), rounds)
                results.append(
                    DispatchResult(
                        rows=count,
                        hidden=hidden,
                        dispatch_p50_us=ours[0],
                        dispatch_p99_us=ours[1],
                        echo_p50_us=bare[0],
                        echo_p99_us=bare[1],
                    )
                )
        transport.close()
    return results


def _there_and_back(transport: GrpcTransport, shipment: Shipment) -> None:
    transport.send("host", shipment, time.monotonic() + 10)
    [(_, result)] = transport.poll(time.monotonic() + 10)
    assert isinstance(result, torch.Tensor), result


def _microseconds(action: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median and 99th percentile of `rounds` calls, after some to warm up."""
    times = []
    for _ in range(rounds + 50):
        started = time.perf_counter()
        action()
        times.append((time.perf_counter() - started) * 1e6)
    times = sorted(times[50:])
    return round(times[rounds // 2], 1), round(times[rounds * 99 // 100], 1)


class _TrivialExperts:
    """Experts of size 1: their computation costs next to nothing beside a round trip."""

    def __init__(self, terms: LinkTerms) -> None:
        self._weights = ExpertWeights(
            gate_up_FH=torch.zeros(2, terms.hidden_size, dtype=terms.dtype),
            down_HF=torch.zeros(terms.hidden_size, 1, dtype=terms.dtype),
        )

    def load(self, layer: int, expert: int) -> ExpertWeights:
        return self._weights


def _trivial_host_main(pipe: Connection, terms: LinkTerms) -> None:
    torch.set_num_threads(1)
    host = ExpertHost("host", _TrivialExperts(terms))
    host.load((0, 0))
    _serve_until_closed(pipe, host, terms)


def _serve_until_closed(pipe: Connection, host: ExpertHost, terms: LinkTerms) -> None:
    server = serve_expert_host(host, terms=terms, incarnation=1, bind="127.0.0.1")
    pipe.send(server.address)
    try:
        pipe.recv()
    except EOFError:
        server.stop(0)


def print_results(results: Sequence[EngineResult] | Sequence[DispatchResult], out: str | None = None) -> None:
    """A table on the screen; `out` also gets JSON with the setup ("-": JSON on standard output, and no table)."""
    rows = [asdict(result) for result in results]
    setup = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    document = json.dumps({"setup": setup, "results": rows}, indent=1)
    if out == "-":
        print(document)
        return
    if out:
        Path(out).write_text(document + "\n")
    widths = {name: max(len(name), 9) for name in rows[0]}
    print("  ".join(f"{name:>{width}}" for name, width in widths.items()))
    for row in rows:
        print("  ".join(f"{row[name]:>{width}}" for name, width in widths.items()))
