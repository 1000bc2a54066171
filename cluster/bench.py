"""Measures the engine without Ray or HTTP: prefill and decode speed of one router, with its experts here or on hosts.

Random distinct prompts, greedy, end tokens ignored. Prefill is timed from submission to the last request's first token,
decode from there to the end, so both are rates of full batches.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import queue
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from cluster.config import ServeSettings
from cluster.control.pack import pack
from cluster.local import Model, build_engine, open_model
from cluster.topology import Role, needs
from experts.host import ExpertHost
from experts.placement import ClusterView, ExpertKey, HostInfo, Placement
from experts.transport.grpc_client import GrpcTransport
from experts.transport.grpc_server import serve_expert_host
from router.dispatch import DispatchStats, RemoteExperts
from router.engine.engine import Engine
from router.engine.request import Event, FinishEvent, SamplingParams, TokenEvent
from router.local_experts import LocalExperts

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
        store = model.store()
        local = LocalExperts({key: store.load(*key) for key in store.all_keys()})
        engine = build_engine(model, settings, local, lambda _missing: True)
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
    context = multiprocessing.get_context("spawn")
    placement = pack(
        layers=model.config.moe_layers,
        num_experts=model.config.num_experts,
        hosts=settings.host_names,
        num_replicas=settings.replicas,
    )
    children = []
    for name in settings.host_names:
        ours, theirs = context.Pipe()
        share = [key for key, holders in placement.items() if name in holders]
        child = context.Process(target=_host_main, args=(theirs, name, settings, share), daemon=True)
        child.start()
        children.append((name, child, ours))
    try:
        hosts = {
            name: HostInfo(name=name, incarnation=1, address=_address(pipe, name), state="ready")
            for name, _, pipe in children
        }
        yield ClusterView(version=1, placement=Placement(epoch=1, replicas=placement), hosts=hosts)
    finally:
        for _, child, pipe in children:
            pipe.close()
            child.join(timeout=10)
            child.kill()


def _address(pipe: Connection, name: str) -> str:
    assert pipe.poll(TIMEOUT_S), f"{name} did not start"
    address: str = pipe.recv()
    return address


def _host_main(pipe: Connection, name: str, settings: ServeSettings, keys: Sequence[ExpertKey]) -> None:
    """A host process: load, listen, say where, and end when the parent's end of the pipe closes."""
    torch.set_num_threads(needs(settings, Role.HOST).threads)
    model = open_model(settings.model_dir, settings.dtype)
    host = ExpertHost(name, model.store())
    for key in keys:
        host.load(key)
    server = serve_expert_host(host, terms=model.terms(), incarnation=1, bind="127.0.0.1")
    pipe.send(server.address)
    try:
        pipe.recv()
    except EOFError:
        server.stop(0)


def print_results(results: Sequence[EngineResult], out: str | None) -> None:
    """A table on the screen; `out` also gets JSON with the setup ("-" is standard output instead of the table)."""
    setup = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    document = json.dumps({"setup": setup, "results": [asdict(result) for result in results]}, indent=1)
    if out == "-":
        sys.stdout.write(document + "\n")
        return
    if out:
        Path(out).write_text(document + "\n")
    print(f"{'transport':>9} {'hosts':>5} {'batch':>5} {'prompt':>6} {'output':>6} "
          f"{'prefill tok/s':>13} {'decode tok/s':>12} {'step ms':>8} {'dispatch µs':>11}")  # fmt: skip
    for r in results:
        print(f"{r.transport:>9} {r.hosts:>5} {r.batch:>5} {r.prompt:>6} {r.output:>6} "
              f"{r.prefill_tokens_per_s:>13.1f} {r.decode_tokens_per_s:>12.1f} {r.step_ms:>8.2f} "
              f"{r.dispatch_us:>11.1f}")  # fmt: skip
