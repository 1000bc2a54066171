"""The one place that decides what a process may use: threads, accelerators, memory of Ray, connections."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.config import ServeSettings

OBJECT_STORE_BYTES = 100 * 1000 * 1000
"""Ray's own default is 30 % of the machine; nothing of ours travels through its object store."""

SLACK_CONNECTIONS = 1024
"""Room at an ingress for what is no generation (health, models), about to be refused, or idle."""


class Role(StrEnum):
    """The kinds of process."""

    CONTROLLER = "controller"
    HOST = "host"
    ROUTER = "router"
    INGRESS = "ingress"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one process gets. `num_cpus` is what it asks of Ray: nothing, or a few hosts and routers would never
    start on two cores; how much it computes is decided by `threads`."""

    threads: int
    num_cpus: float = 0.0
    num_gpus: float = 0.0


def needs(settings: ServeSettings, role: Role, num_cores: int | None = None) -> Needs:
    """What a process of `role` gets. `num_cores` are those of its machine; None: this one.

    Two processes that compute with two threads each on two cores stall each other, so only one that computes alone
    gets all cores. With several threads bits depend on where they cut the work.
    """
    computes_alone = role is Role.ROUTER and settings.transport == "local" and settings.routers == 1
    cores = num_cores or os.cpu_count() or 1
    computes = role in (Role.HOST, Role.ROUTER)
    return Needs(
        threads=cores if computes_alone and not settings.deterministic else 1,
        num_gpus=1.0 if computes and settings.device == "cuda" else 0.0,
    )


def metrics_ports(settings: ServeSettings, role: Role) -> Sequence[int] | None:
    """The ports to try for the metrics page of a process, in this order; None: any.

    The first one is the controller's, unless nothing else is free: its page is where Prometheus asks for the others.
    """
    ports = settings.metrics_ports
    if ports is None or role is Role.CONTROLLER:
        return ports
    return [*ports[1:], ports[0]]


def max_connections(settings: ServeSettings) -> int:
    """How many clients one ingress may have: for all that the engines run and queue, and some more."""
    return settings.routers * (settings.max_running + settings.max_waiting) + SLACK_CONNECTIONS


def advertised_host(settings: ServeSettings, node_address: str, port: int) -> str:
    """What routers are told of a host that listens on `port`: "address:port"."""
    address, ports = settings.advertised()
    if ports is not None and settings.host_ports is not None:
        port = ports[0] + port - settings.host_ports[0]
    return f"{address or node_address}:{port}"
