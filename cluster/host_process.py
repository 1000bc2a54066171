"""The process of one expert host: listener, loading and evicting as ordered, reports, and the end when nobody cares.

Knows nothing of Ray; whoever starts it says how it leaves.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from cluster.config import ServeSettings
from cluster.local import choose_device, choose_products, open_model
from cluster.metrics.host import HostNumbers, host_families
from cluster.metrics.page import MetricsPage
from cluster.order_follower import OrderFollower
from cluster.topology import Role, advertised_host, metrics_ports, needs
from experts.errors import InvalidInput
from experts.ffn import ExpertWeights
from experts.grpc_control import HostLink
from experts.host import ExpertHost
from experts.placement import ExpertKey
from experts.reports import HostReport, Peer
from experts.transport.grpc_server import serve_expert_host
from experts.transport.grpc_weights import PeerWeights

ORPHAN_S = 60.0
"""Without the controller and without any router for so long, nobody will ever come back for this host."""
STOP_GRACE_S = 2.0
SCRUB_BYTES_PER_S = 1e8
"""A hundredth of what memory gives; 50 GB of experts are read once in eight minutes."""
SCRUB_PAUSE_S = 0.2

log = logging.getLogger(__name__)


class HostProcess:
    """An expert host with all its parts. `resolve` gives the controller's address; `leave` ends the process for good
    and is called at most once, from a thread of this object."""

    def __init__(
        self,
        settings: ServeSettings,
        *,
        name: str,
        node: str,
        bind: str,
        resolve: Callable[[], str],
        leave: Callable[[], None],
        orphan_s: float = ORPHAN_S,
    ) -> None:
        """Listens at once, holding nothing. Raises CheckpointError and InvalidInput."""
        torch.set_num_threads(needs(settings, Role.HOST).threads)
        self.name = name
        model = open_model(settings.model_dir, settings.dtype)
        self.host = ExpertHost(name, model.store(choose_device(settings)), choose_products(model, settings))
        self.incarnation = time.time_ns()
        bind = settings.host_bind or bind
        settings.check_rows_on(node)
        identity = settings.identity()
        self.server = serve_expert_host(
            self.host,
            terms=model.terms(),
            incarnation=self.incarnation,
            bind=bind,
            ports=settings.host_ports,
            tls=identity,
            insecure=settings.insecure_rows,
        )
        self.address = advertised_host(settings, node, self.server.port)
        self.metrics = MetricsPage(
            lambda: host_families(self.numbers()), bind=bind, ports=metrics_ports(settings, Role.HOST)
        )
        self._node = node
        self._held_bytes = 0
        self._leave = leave
        self._orphan_s = orphan_s
        self._stopping = threading.Event()
        peers = PeerWeights(
            name=name,
            terms=model.terms(),
            expert_size=model.config.expert_size,
            tls=identity,
            insecure=settings.insecure_rows,
        )
        self._device = choose_device(settings)

        def fetch(peer: Peer, key: ExpertKey, bytes_per_s: float) -> ExpertWeights:
            return peers.fetch(peer, key, bytes_per_s).to(self._device)

        self.follower = OrderFollower(self.host, on_progress=self._progressed, leave=leave, fetch=fetch)
        self.link = HostLink(
            resolve=resolve, report=self.report, on_order=self.follower.take, on_cut=self.server.cut, tls=identity
        )
        self._watcher = threading.Thread(target=self._watch, name="host-watch", daemon=True)
        self._scrubber = threading.Thread(target=self._scrub, name="host-scrub", daemon=True)

    def start(self) -> None:
        """Tell the controller, and do what it orders."""
        self.link.start()
        self.follower.start()
        self._watcher.start()
        self._scrubber.start()

    def report(self) -> HostReport:
        """How this host is now, for the controller."""
        # Before what is held: what was loaded meanwhile does no harm.
        result, load = self.follower.result, self.host.load_snapshot()
        return HostReport(
            name=self.name,
            incarnation=self.incarnation,
            address=self.address,
            node=self._node,
            pid=os.getpid(),
            metrics_address=self.metrics.address,
            transport="grpc",
            held=self.host.held(),
            held_bytes=self.host.held_bytes,
            rows_total=load.rows_total,
            problem=result.problem,
            cost=self.host.cost,
            failed=result.failed,
            order=result.order,
            rows=load.rows,
            num_shipments=load.num_shipments,
            compute_s=load.compute_s,
            num_damaged=self.host.num_damaged,
        )

    def numbers(self) -> HostNumbers:
        """For the metrics page."""
        return HostNumbers(
            name=self.name,
            load=self.host.load_snapshot(),
            held=self.host.held(),
            held_bytes=self.host.held_bytes,
            queue_depth=self.server.queue_depth,
        )

    def stop(self) -> None:
        """Answer what is being computed, then end every part."""
        self._stopping.set()
        self.follower.stop()
        self.link.close()
        self.server.stop(STOP_GRACE_S)
        self.metrics.close()
        self.follower.join(STOP_GRACE_S)
        self._watcher.join(timeout=STOP_GRACE_S)
        self._scrubber.join(timeout=STOP_GRACE_S)

    def _progressed(self) -> None:
        """What an expert costs is measured once, on the first ones that are here."""
        if self.host.cost is None:
            self.host.measure()
        self.link.poke()

    def _scrub(self) -> None:
        """Read all weights again and again, slowly, and have loaded anew what has changed."""
        while not self._stopping.wait(SCRUB_PAUSE_S):
            for key in sorted(self.host.held()):
                damaged = self.host.num_damaged
                num_bytes = self.host.scrub(key)
                if self.host.num_damaged != damaged:
                    self.link.poke()
                    self.follower.look()
                if self._stopping.wait(max(SCRUB_PAUSE_S, num_bytes / SCRUB_BYTES_PER_S)):
                    return

    def _watch(self) -> None:
        while not self._stopping.wait(min(1.0, self._orphan_s / 4)):
            if self.server.num_links == 0 and self.link.away_s() > self._orphan_s:
                log.warning("host %s leaves: no router and no controller for %.0f s", self.name, self._orphan_s)
                self._leave()
                return


def tell_failure(
    settings: ServeSettings, name: str, *, node: str, resolve: Callable[[], str], problem: str, for_s: float
) -> None:
    """Tell the controller for `for_s` seconds why this host could not even begin."""
    incarnation = time.time_ns()

    def report() -> HostReport:
        return HostReport(name=name, incarnation=incarnation, node=node, pid=os.getpid(), problem=problem)

    # Without an identity nobody listens to us, and the log has told why.
    tls = None
    with suppress(InvalidInput):
        tls = settings.identity()
    link = HostLink(resolve=resolve, report=report, on_order=lambda order: None, tls=tls)
    link.start()
    time.sleep(for_s)
    link.close()
