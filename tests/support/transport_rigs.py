"""Hosts, a transport that reaches them, and the faults that a test may cause, in one shape for every transport."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import torch
from expert_hosts import GatedHost, make_host, make_terms, wait_until

from cluster.simulate.host import Health, HostListener
from cluster.simulate.network import Network
from cluster.simulate.process import Process
from cluster.simulate.transport import VirtualTransport
from cluster.simulate.world import World
from experts.placement import ExpertKey, HostInfo
from experts.transport.base import Transport
from experts.transport.grpc_client import GrpcTransport
from experts.transport.grpc_link import Reconnect
from experts.transport.grpc_server import ExpertHostServer, serve_expert_host
from experts.transport.local import FaultyLocalTransport

LOCALHOST = "127.0.0.1"


class Rig:
    """`transport` is linked to every host of `hosts` when it begins."""

    transport: Transport

    def __init__(self, keys_of: dict[str, list[ExpertKey]], dtype: torch.dtype) -> None:
        self.hosts: dict[str, GatedHost] = {name: make_host(name, keys, dtype) for name, keys in keys_of.items()}
        self.infos = {name: HostInfo(name=name, incarnation=1, address=name) for name in keys_of}
        self.changes = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        self.transport.connect(self.infos)
        self.wait_linked(*self.hosts)

    def changed(self) -> None:
        with self._lock:
            self.changes += 1

    def wait_linked(self, *names: str) -> None:
        wait_until(lambda: self.transport.linked() == set(names), f"links to {names}")

    def stall(self, name: str) -> None:
        """The host takes shipments and answers nothing."""
        raise AssertionError

    def resume(self, name: str) -> None:
        """The end of `stall`."""
        raise AssertionError

    def kill(self, name: str) -> None:
        """The host's end of the link goes away."""
        raise AssertionError

    def restart(self, name: str, *, elsewhere: bool = False) -> None:
        """A new life of a killed host, at another address or at its old one; `infos` tells."""
        raise AssertionError

    def end(self) -> None:
        self.transport.close()


class LocalRig(Rig):
    def __init__(self, keys_of: dict[str, list[ExpertKey]], dtype: torch.dtype) -> None:
        super().__init__(keys_of, dtype)
        self.transport: FaultyLocalTransport = FaultyLocalTransport(self.hosts, self.changed)

    def stall(self, name: str) -> None:
        self.transport.stall(name)

    def resume(self, name: str) -> None:
        self.transport.restore(name)

    def kill(self, name: str) -> None:
        self.transport.lose(name)

    def restart(self, name: str, *, elsewhere: bool = False) -> None:
        info = self.infos[name]
        self.infos[name] = replace(info, incarnation=info.incarnation + 1, address=f"{name}-{elsewhere}")
        self.transport.restore(name)


class GrpcRig(Rig):
    def __init__(self, keys_of: dict[str, list[ExpertKey]], dtype: torch.dtype) -> None:
        super().__init__(keys_of, dtype)
        self.terms = make_terms(dtype)
        self.servers: dict[str, ExpertHostServer] = {name: self._serve(name, 0) for name in keys_of}
        self.infos = {
            name: HostInfo(name=name, incarnation=1, address=server.address) for name, server in self.servers.items()
        }
        self.transport: GrpcTransport = GrpcTransport(
            router_name="router",
            terms=self.terms,
            on_change=self.changed,
            reconnect=Reconnect(first_s=0.01, longest_s=0.05, refused_s=0.05),
        )

    def _serve(self, name: str, port: int) -> ExpertHostServer:
        ports = range(port, port + 1) if port else None
        return serve_expert_host(
            self.hosts[name], terms=self.terms, incarnation=1, bind=LOCALHOST, ports=ports, max_streams=4
        )

    def stall(self, name: str) -> None:
        self.hosts[name].gate.clear()

    def resume(self, name: str) -> None:
        self.hosts[name].gate.set()

    def kill(self, name: str) -> None:
        self.servers[name].stop(grace=0)
        self.hosts[name].gate.set()

    def restart(self, name: str, *, elsewhere: bool = False) -> None:
        server = self._serve(name, 0 if elsewhere else self.servers[name].port)
        self.servers[name] = server
        incarnation = self.infos[name].incarnation + 1
        self.infos[name] = HostInfo(name=name, incarnation=incarnation, address=server.address)

    def end(self) -> None:
        super().end()
        for name, server in self.servers.items():
            self.hosts[name].gate.set()
            server.stop(grace=0)


class VirtualRig(Rig):
    """Hosts on the simulator's network. `time` stands for the module: in it, looking at the clock takes half a
    millisecond, so that whoever looks again and again sees things happen."""

    def __init__(self, keys_of: dict[str, list[ExpertKey]], dtype: torch.dtype) -> None:
        super().__init__(keys_of, dtype)
        self.world = World(0)
        self.network = Network(world=self.world)
        self.processes: dict[str, Process] = {}
        for name in keys_of:
            self._begin(name)
        self.transport: VirtualTransport = VirtualTransport(
            self.network, Process(self.world, "router", 1), on_change=self.changed
        )
        self.time = SimpleNamespace(monotonic=self._monotonic, sleep=self._sleep)

    def _begin(self, name: str) -> None:
        info = self.infos[name]
        self.processes[name] = Process(self.world, name, info.incarnation)
        HostListener(
            self.network,
            self.processes[name],
            self.hosts[name],
            address=info.address,
            incarnation=info.incarnation,
            health=Health(),
        )

    def _sleep(self, delay_s: float) -> None:
        self.world.run(self.world.now + delay_s)

    def _monotonic(self) -> float:
        self._sleep(0.0005)
        return self.world.now

    def stall(self, name: str) -> None:
        self.processes[name].stop()

    def resume(self, name: str) -> None:
        self.processes[name].go_on()

    def kill(self, name: str) -> None:
        self.processes[name].kill()

    def restart(self, name: str, *, elsewhere: bool = False) -> None:
        info = self.infos[name]
        self.infos[name] = replace(info, incarnation=info.incarnation + 1, address=f"{name}-{elsewhere}")
        self._begin(name)
        self.transport.connect(self.infos)
