"""What hosts' arithmetic costs. Hosts of one node are alike: what differs between them is how busy it was when they
measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median

from cluster.control.state import HostState
from experts.placement import ComputeCost


def costs_of(hosts: Mapping[str, HostState]) -> dict[str, ComputeCost | None]:
    """Of each of `hosts` what is usual on its node, or else anywhere; None while nobody has measured."""
    by_node: dict[str, list[ComputeCost]] = {}
    for host in hosts.values():
        if host.report is not None and host.report.cost is not None:
            by_node.setdefault(node_of(host), []).append(host.report.cost)
    usual = {node: _middle(costs) for node, costs in by_node.items()}
    anywhere = _middle(cost for costs in by_node.values() for cost in costs)
    return {name: usual.get(node_of(host), anywhere) for name, host in hosts.items()}


def node_of(host: HostState) -> str:
    return host.report.node if host.report is not None else ""


def _middle(costs: Iterable[ComputeCost]) -> ComputeCost | None:
    costs = list(costs)
    if not costs:
        return None
    return ComputeCost(
        per_expert_s=median(cost.per_expert_s for cost in costs), per_row_s=median(cost.per_row_s for cost in costs)
    )
