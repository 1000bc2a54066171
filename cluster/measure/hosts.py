"""Expert hosts as plain child processes on the loopback: what benches use where a cluster would use Ray."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from cluster.config import ServeSettings
from cluster.control.pack import pack
from cluster.local import Model, choose_device, choose_products, open_model
from cluster.topology import Role, needs
from experts.host import ExpertHost
from experts.link_terms import LinkTerms
from experts.placement import ClusterView, ExpertKey, HostInfo, Placement
from experts.transport.base import Transport
from experts.transport.grpc_client import GrpcTransport
from experts.transport.grpc_server import serve_expert_host
from router.dispatch import RemoteExperts

TIMEOUT_S = 600.0
ASK_COMPUTE_S = "compute_s"


@dataclass(frozen=True)
class HostProcesses:
    """The running hosts: how routers reach them, and how long they have computed."""

    view: ClusterView
    pipes: Mapping[str, Connection]

    def compute_s(self) -> dict[str, float]:
        """Seconds that each host has computed since its start."""
        for pipe in self.pipes.values():
            pipe.send(ASK_COMPUTE_S)
        return {name: float(str(_receive(pipe))) for name, pipe in self.pipes.items()}


@contextmanager
def host_processes(model: Model, settings: ServeSettings) -> Iterator[HostProcesses]:
    """Hosts that hold all experts between them; they end with the block."""
    placement = pack(
        layers=model.config.moe_layers,
        num_experts=model.config.num_experts,
        hosts=settings.host_names,
        num_replicas=settings.replicas,
    )
    shares = {name: [key for key, holders in placement.items() if name in holders] for name in settings.host_names}
    with ExitStack() as stack:
        pipes = {name: stack.enter_context(child(_host_main, name, settings, share)) for name, share in shares.items()}
        hosts = {
            name: HostInfo(name=name, incarnation=1, address=str(_receive(pipe)), state="ready")
            for name, pipe in pipes.items()
        }
        view = ClusterView(version=1, placement=Placement(epoch=1, replicas=placement), hosts=hosts)
        yield HostProcesses(view, pipes)


@contextmanager
def remote_experts(model: Model, settings: ServeSettings) -> Iterator[tuple[RemoteExperts, HostProcesses]]:
    """Experts on host processes that are linked to this one."""
    transport = GrpcTransport(router_name="bench", terms=model.terms())
    with host_processes(model, settings) as hosts, closing(transport):
        remote = RemoteExperts(transport)
        remote.connect(hosts.view)
        await_links(transport, len(hosts.view.hosts))
        yield remote, hosts


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
    return str(_receive(pipe))


def await_links(transport: Transport, num_hosts: int) -> None:
    """Return when that many hosts are linked."""
    give_up = time.monotonic() + 60
    while len(transport.linked()) < num_hosts:
        assert time.monotonic() < give_up, "a host process did not answer"
        time.sleep(0.01)


def serve_until_closed(pipe: Connection, host: ExpertHost, terms: LinkTerms) -> None:
    """Serve `host` and answer questions until the other end of the pipe closes."""
    server = serve_expert_host(host, terms=terms, incarnation=1, bind="127.0.0.1")
    pipe.send(server.address)
    try:
        while pipe.recv() == ASK_COMPUTE_S:
            pipe.send(host.load_snapshot().compute_s)
    except EOFError:
        server.stop(0)


def _host_main(pipe: Connection, name: str, settings: ServeSettings, keys: Sequence[ExpertKey]) -> None:
    """A host process: load, listen, say where, and end when the parent's end of the pipe closes."""
    torch.set_num_threads(needs(settings, Role.HOST).threads)
    model = open_model(settings.model_dir, settings.dtype)
    host = ExpertHost(name, model.store(choose_device(settings)), choose_products(model, settings))
    for key in keys:
        host.load(key)
    serve_until_closed(pipe, host, model.terms())


def _receive(pipe: Connection) -> object:
    assert pipe.poll(TIMEOUT_S), "a child process did not answer"
    return pipe.recv()
