"""The process of one router: engine, links to hosts, listener for ingresses, and what it tells the controller.

Knows nothing of Ray; whoever starts it watches `alive`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import torch

from cluster.config import ServeSettings
from cluster.cpu_account import ENGINE_THREAD, name_threads
from cluster.local import build_engine, load_local_experts, open_model
from cluster.metrics.host import HostNumbers
from cluster.metrics.page import MetricsPage
from cluster.metrics.router import RouterNumbers, router_families
from cluster.topology import Role, metrics_ports, needs
from experts.grpc_control import MemberLink
from experts.placement import ClusterView, ExpertKey
from experts.reports import HostReport, MemberKind, MemberReport
from experts.transport.grpc_client import GrpcTransport
from router.dispatch import RemoteExperts
from router.engine.engine import Engine
from router.grpc_server import RouterServer
from router.local_experts import LocalExperts


class RouterProcess:
    """A router with all its parts: engine, links to hosts (or the experts themselves), listener, controller link.

    `resolve` gives the controller's address. Constructing loads the weights and may take long; `start` does not.
    """

    def __init__(self, settings: ServeSettings, *, name: str, node: str, bind: str, resolve: Callable[[], str]) -> None:
        torch.set_num_threads(needs(settings, Role.ROUTER).threads)
        self.name = name
        self._node = node
        self.model = open_model(settings.model_dir, settings.dtype)
        self._identity = settings.identity()
        self.experts = self._experts(settings)
        self.engine = self._engine(settings)
        self.server = RouterServer(self.engine, bind=bind, ports=settings.router_ports, tls=self._identity)
        self.link = MemberLink(resolve=resolve, report=self.report, on_view=self._use, tls=self._identity)
        self.metrics = MetricsPage(
            lambda: router_families(self.numbers()), bind=bind, ports=metrics_ports(settings, Role.ROUTER)
        )
        self._incarnation = time.time_ns()

    def _engine(self, settings: ServeSettings) -> Engine:
        experts = self.experts
        if isinstance(experts, LocalExperts):
            return build_engine(self.model, settings, experts, _always, at_hand=experts.stacked)
        return build_engine(self.model, settings, experts, experts.available, begin_step=experts.begin_step)

    def _experts(self, settings: ServeSettings) -> RemoteExperts | LocalExperts:
        if settings.transport == "local":
            return load_local_experts(self.model, settings)
        transport = GrpcTransport(
            router_name=self.name,
            terms=self.model.terms(),
            on_change=lambda: self.engine.wake(),
            tls=self._identity,
            insecure=settings.insecure_rows,
        )
        return RemoteExperts(transport, node=self._node)

    def start(self) -> None:
        """Begin to serve and to tell the controller so."""
        self.engine.start()
        # Before the first step: torch's threads take the name of the thread that starts them.
        name_threads(thread for thread in threading.enumerate() if thread.name == ENGINE_THREAD)
        self.server.start()
        self.link.start()

    @property
    def alive(self) -> bool:
        """False once the engine has ended: then this process is of no use any more."""
        return self.engine.alive

    def report(self) -> MemberReport:
        """How this router is now, for the controller."""
        running, waiting, parked = self.engine.load()
        return MemberReport(
            kind=MemberKind.ROUTER,
            name=self.name,
            address=self.server.address,
            node=self._node,
            pid=os.getpid(),
            state="ready" if self.alive else "stopping",
            running=running + parked,
            waiting=waiting,
            metrics_address=self.metrics.address,
            max_model_len=self.engine.max_model_len,
            kv_tokens=self.engine.kv_numbers().tokens,
            inner_host=self._inner_host(),
            hosts=dict(self.experts.stats.hosts) if isinstance(self.experts, RemoteExperts) else {},
            longest_wait_s=self.engine.longest_wait_s(),
        )

    def numbers(self) -> RouterNumbers:
        """For the metrics page."""
        running, waiting, parked = self.engine.load()
        return RouterNumbers(
            engine=self.engine.stats,
            running=running,
            waiting=waiting,
            parked=parked,
            kv=self.engine.kv_numbers(),
            max_model_len=self.engine.max_model_len,
            longest_wait_s=self.engine.longest_wait_s(),
            dispatch=self.experts.stats if isinstance(self.experts, RemoteExperts) else None,
            inner=None if isinstance(self.experts, RemoteExperts) else self._inner_numbers(self.experts),
        )

    def _inner_numbers(self, experts: LocalExperts) -> HostNumbers:
        return HostNumbers(
            name=self._inner_name,
            load=experts.load_snapshot(),
            held=frozenset(experts.weights),
            held_bytes=experts.num_bytes,
        )

    @property
    def _inner_name(self) -> str:
        return f"{self.name}-local"

    def _inner_host(self) -> HostReport | None:
        if isinstance(self.experts, RemoteExperts):
            return None
        return HostReport(
            name=self._inner_name,
            incarnation=self._incarnation,
            node=self._node,
            pid=os.getpid(),
            transport="local",
            held=frozenset(self.experts.weights),
            held_bytes=self.experts.num_bytes,
            rows_total=self.experts.load_snapshot().rows_total,
        )

    def _use(self, view: ClusterView) -> None:
        if isinstance(self.experts, RemoteExperts):
            self.experts.connect(view)
            self.engine.wake()

    def stop(self) -> None:
        """Give requests up (other routers continue them), then end every part."""
        self.link.close()
        self.metrics.close()
        self.engine.stop()
        self.server.stop()
        if isinstance(self.experts, RemoteExperts):
            self.experts.transport.close()


def _always(_missing: frozenset[ExpertKey]) -> bool:
    return True
