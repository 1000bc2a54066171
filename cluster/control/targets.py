"""Where Prometheus finds the metrics pages of a cluster: the list that `http_sd` and `file_sd` read. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator

from experts.reports import ClusterStatus


def targets_json(status: ClusterStatus) -> bytes:
    """One group for each process that has a page, with labels `cluster`, `role` and `name`.

    A host that is lost stays in it as long as it is wanted, so that its page is seen to be down.
    """
    groups = [
        {"targets": [address], "labels": {"cluster": status.name, "role": role, "name": name}}
        for role, name, address in _pages(status)
        if address
    ]
    return json.dumps(groups, indent=1).encode()


def _pages(status: ClusterStatus) -> Iterator[tuple[str, str, str]]:
    yield "controller", "controller", status.controller.metrics_address
    for ingress in status.ingresses:
        yield "ingress", ingress.name, ingress.metrics_address
    for router in status.routers:
        yield "router", router.name, router.metrics_address
    for host in status.hosts:
        # A host inside a router is on that router's page.
        if host.transport != "local":
            yield "host", host.name, host.metrics_address
