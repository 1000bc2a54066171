"""The process of the controller: what the cluster shall be, its journal, its run file, its metrics page.

Knows nothing of Ray; the executor that starts hosts is handed in.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cluster.config import ServeSettings
from cluster.control.grpc_server import ControlServer, Executor, Listener
from cluster.control.journal import JournalFile
from cluster.control.move_state import Limits
from cluster.control.pack import pack
from cluster.control.plan import Policy
from cluster.control.prometheus_load import PrometheusLoad
from cluster.control.reading import LoadSource
from cluster.control.replicas import Replicas
from cluster.control.scale import Scaling
from cluster.control.scrape_load import ScrapeLoad
from cluster.control.state import Journal, Steering
from cluster.control.targets import targets_json
from cluster.metrics.controller import controller_families
from cluster.metrics.page import MetricsPage
from cluster.run_file import RunFile, prepare_state_dir, run_file_path, state_dirs, write_run_file
from cluster.targets_file import TargetsFile
from cluster.topology import Role, metrics_ports
from experts.config import load_config

TARGETS_PATH = "/targets"
"""On the controller's metrics page: what Prometheus's `http_sd` asks for."""

log = logging.getLogger(__name__)


class ControllerProcess:
    """The controller with all its parts. `life_name` tells the journals of different Ray clusters apart."""

    def __init__(self, settings: ServeSettings, *, node: str, bind: str, life_name: str, executor: Executor) -> None:
        """Nothing listens yet. Raises CheckpointError and InvalidInput."""
        folder = prepare_state_dir(Path(settings.state_dir) if settings.state_dir else state_dirs({})[0])
        self._settings = settings
        self._bind = bind
        self._run_file = run_file_path(folder, settings.name, settings.port)
        self._journal = JournalFile(journal_path(folder, settings, life_name))
        self.server = ControlServer(
            name=settings.name,
            journal=self._journal,
            fresh=Journal(digest=settings.digest(), target=plan_target(settings)),
            hosts=settings.host_names,
            executor=executor,
            listener=Listener(bind=bind, advertise=node, port=settings.control_port, tls=settings.identity()),
            node=node,
            prometheus=settings.prometheus,
            steering=steering_of(settings),
            load=load_source_of(settings),
        )
        self._metrics: MetricsPage | None = None
        self._targets_file: TargetsFile | None = None

    def start(self) -> str:
        """Listen; returns the control address. Raises InvalidInput when a wanted port is taken."""
        address = self.server.start()
        self._metrics = MetricsPage(
            lambda: controller_families(self.server.numbers()),
            bind=self._bind,
            ports=metrics_ports(self._settings, Role.CONTROLLER),
            documents={TARGETS_PATH: self._targets},
        )
        self.server.set_metrics_address(self._metrics.address)
        if self._settings.targets_file:
            self._targets_file = TargetsFile(Path(self._settings.targets_file), self._targets)
        write_run_file(
            self._run_file,
            RunFile(
                name=self._settings.name,
                control=address,
                pid=os.getpid(),
                http=http_url(self._settings),
                tls_cert=self._settings.tls_cert,
                tls_key=self._settings.tls_key,
                tls_ca=self._settings.tls_ca,
            ),
        )
        return address

    def _targets(self) -> bytes:
        return targets_json(self.server.status())

    def remove_files(self) -> None:
        """The cluster is over: nothing of it stays on disk."""
        if self._targets_file is not None:
            self._targets_file.close()
            self._targets_file.remove()
        self._journal.remove()
        self._run_file.unlink(missing_ok=True)

    def stop(self) -> None:
        """End the listener and the page; the files stay for the next life."""
        if self._targets_file is not None:
            self._targets_file.close()
        self.server.stop()
        if self._metrics is not None:
            self._metrics.close()


def plan_target(settings: ServeSettings) -> Replicas:
    """The initial placement of the model's experts; empty where routers compute them themselves."""
    hosts = settings.host_names
    if not hosts:
        return {}
    config = load_config(settings.model_dir)
    return pack(layers=config.moe_layers, num_experts=config.num_experts, hosts=hosts, num_replicas=settings.replicas)


def load_source_of(settings: ServeSettings) -> LoadSource:
    """Prometheus where there is one, else the pages themselves."""
    return PrometheusLoad(settings.prometheus, settings.name) if settings.prometheus else ScrapeLoad()


def steering_of(settings: ServeSettings) -> Steering:
    """How experts are placed and moved."""
    scaling = Scaling(min_hosts=settings.hosts, max_hosts=settings.max_hosts) if settings.max_hosts else None
    return Steering(
        rebalances=settings.rebalance,
        num_replicas=settings.replicas,
        extra_slots=settings.extra_slots,
        policy=Policy(min_replicas=settings.replicas, scaling=scaling or Scaling()),
        limits=Limits(min_replicas=settings.replicas),
        scaling=scaling,
    )


def journal_path(folder: Path, settings: ServeSettings, life_name: str) -> Path:
    """The journal of the cluster `settings.name` on the Ray cluster `life_name`."""
    return folder / f"{settings.name}-{life_name}.journal"


def http_url(settings: ServeSettings, node: str = "127.0.0.1") -> str:
    """Where clients reach the cluster; on `node` where it listens on every address."""
    everywhere = settings.host in ("", "0.0.0.0", "::")
    return f"http://{node if everywhere else settings.host}:{settings.port}"
