"""Turns placements, views, reports and status into protobuf messages and back; knows no channel.

Each pair `x_to_wire` / `x_from_wire` is its own inverse, whatever the order of repeated fields.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import isfinite
from types import MappingProxyType

from experts.placement import ClusterView, ComputeCost, ExpertKey, HostInfo, IngressInfo, Placement, RouterInfo
from experts.reports import (
    ClusterStatus,
    ControllerInfo,
    HostOrder,
    HostReport,
    MemberKind,
    MemberReport,
    Peer,
    PlacementStatus,
)
from experts.wire import control_pb2 as pb

_KIND_TO_WIRE = {
    MemberKind.ROUTER: pb.MEMBER_KIND_ROUTER,
    MemberKind.INGRESS: pb.MEMBER_KIND_INGRESS,
}
_KIND_FROM_WIRE = {number: kind for kind, number in _KIND_TO_WIRE.items()}


def view_to_wire(view: ClusterView) -> pb.ClusterView:
    return pb.ClusterView(
        version=view.version,
        placement=placement_to_wire(view.placement),
        hosts=[_host_to_wire(host) for host in view.hosts.values()],
        routers=[_router_to_wire(router) for router in view.routers.values()],
        draining=view.draining,
    )


def view_from_wire(message: pb.ClusterView) -> ClusterView:
    """Raises ValueError when a replica names a host index that the message does not have."""
    return ClusterView(
        version=message.version,
        placement=placement_from_wire(message.placement),
        hosts=MappingProxyType({host.name: _host_from_wire(host) for host in message.hosts}),
        routers=MappingProxyType({router.name: _router_from_wire(router) for router in message.routers}),
        draining=message.draining,
    )


def host_report_to_wire(report: HostReport) -> pb.HostReport:
    return pb.HostReport(
        name=report.name,
        incarnation=report.incarnation,
        address=report.address,
        node=report.node,
        pid=report.pid,
        metrics_address=report.metrics_address,
        transport=report.transport,
        held=keys_to_wire(report.held),
        rows_total=report.rows_total,
        held_bytes=report.held_bytes,
        problem=report.problem,
        cost=_cost_to_wire(report.cost),
        failed=keys_to_wire(report.failed),
        order=report.order,
        rows=rows_to_wire(report.rows),
        num_shipments=report.num_shipments,
        compute_s=report.compute_s,
        num_damaged=report.num_damaged,
    )


def host_report_from_wire(message: pb.HostReport) -> HostReport:
    """Raises ValueError when counters are no numbers, or not as many as their experts."""
    if not (isfinite(message.compute_s) and message.compute_s >= 0):
        raise ValueError("a host's time computing must be a number of at least 0")
    return HostReport(
        name=message.name,
        incarnation=message.incarnation,
        address=message.address,
        node=message.node,
        pid=message.pid,
        metrics_address=message.metrics_address,
        transport=message.transport,
        held=keys_from_wire(message.held),
        rows_total=message.rows_total,
        held_bytes=message.held_bytes,
        problem=message.problem,
        cost=_cost_from_wire(message.cost) if message.HasField("cost") else None,
        failed=keys_from_wire(message.failed),
        order=message.order,
        rows=rows_from_wire(message.rows),
        num_shipments=message.num_shipments,
        compute_s=message.compute_s,
        num_damaged=message.num_damaged,
    )


def rows_to_wire(rows: Mapping[ExpertKey, int]) -> list[pb.LayerRows]:
    layers: dict[int, pb.LayerRows] = {}
    for (layer, expert), number in sorted(rows.items()):
        message = layers.setdefault(layer, pb.LayerRows(layer=layer))
        message.experts.append(expert)
        message.rows.append(number)
    return list(layers.values())


def rows_from_wire(messages: Iterable[pb.LayerRows]) -> Mapping[ExpertKey, int]:
    """Raises ValueError when the two lists are not as long."""
    return MappingProxyType(
        {
            (message.layer, expert): number
            for message in messages
            for expert, number in zip(message.experts, message.rows, strict=True)
        }
    )


def order_to_wire(order: HostOrder) -> pb.HostOrder:
    target = pb.HostOrder.Target(experts=keys_to_wire(order.target))
    by_peer: dict[Peer, list[ExpertKey]] = defaultdict(list)
    for key, peer in sorted(order.peers.items()):
        by_peer[peer].append(key)
    return pb.HostOrder(
        target=target,
        retire=order.retire,
        peers=[
            pb.Peer(name=peer.name, address=peer.address, experts=keys_to_wire(keys)) for peer, keys in by_peer.items()
        ],
        bytes_per_s=order.bytes_per_s,
        number=order.number,
    )


def order_from_wire(message: pb.HostOrder) -> HostOrder | None:
    """None for a message that only says the controller is there."""
    if not message.HasField("target"):
        return None
    peers = {
        key: Peer(name=peer.name, address=peer.address)
        for peer in message.peers
        for key in keys_from_wire(peer.experts)
    }
    return HostOrder(
        target=keys_from_wire(message.target.experts),
        retire=message.retire,
        peers=MappingProxyType(peers),
        bytes_per_s=message.bytes_per_s if isfinite(message.bytes_per_s) else 0.0,
        number=message.number,
    )


def member_report_to_wire(report: MemberReport) -> pb.MemberReport:
    return pb.MemberReport(
        kind=_KIND_TO_WIRE[report.kind],
        name=report.name,
        address=report.address,
        node=report.node,
        pid=report.pid,
        state=report.state,
        running=report.running,
        waiting=report.waiting,
        metrics_address=report.metrics_address,
        http=report.http,
        view_version=report.view_version,
        view_epoch=report.view_epoch,
        max_model_len=report.max_model_len,
        kv_tokens=report.kv_tokens,
        inner_host=None if report.inner_host is None else host_report_to_wire(report.inner_host),
        problem=report.problem,
        hosts=report.hosts,
        longest_wait_s=report.longest_wait_s,
    )


def member_report_from_wire(message: pb.MemberReport) -> MemberReport:
    """Raises ValueError for a member of unknown kind."""
    kind = _KIND_FROM_WIRE.get(message.kind)
    if kind is None:
        raise ValueError(f"member kind {message.kind} is not known")
    return MemberReport(
        kind=kind,
        name=message.name,
        address=message.address,
        node=message.node,
        pid=message.pid,
        state=message.state,
        running=message.running,
        waiting=message.waiting,
        metrics_address=message.metrics_address,
        http=message.http,
        view_version=message.view_version,
        view_epoch=message.view_epoch,
        max_model_len=message.max_model_len,
        kv_tokens=message.kv_tokens,
        inner_host=host_report_from_wire(message.inner_host) if message.HasField("inner_host") else None,
        problem=message.problem,
        hosts=MappingProxyType(dict(message.hosts)),
        longest_wait_s=message.longest_wait_s if message.HasField("longest_wait_s") else None,
    )


def status_to_wire(status: ClusterStatus) -> pb.StatusResponse:
    controller = status.controller
    return pb.StatusResponse(
        name=status.name,
        controller=pb.Controller(
            pid=controller.pid,
            address=controller.address,
            node=controller.node,
            epoch=controller.epoch,
            version=controller.version,
            term=controller.term,
            metrics_address=controller.metrics_address,
            prometheus=controller.prometheus,
        ),
        ingresses=[_ingress_to_wire(ingress) for ingress in status.ingresses],
        routers=[_router_to_wire(router) for router in status.routers],
        hosts=[_host_to_wire(host) for host in status.hosts],
        replicas_held=status.replicas_held,
        replicas_wanted=status.replicas_wanted,
        draining=status.draining,
        problems=status.problems,
        placement=pb.PlacementStatus(
            rebalances=status.placement.rebalances,
            held_by=status.placement.held_by,
            is_moving=status.placement.is_moving,
            loading=status.placement.loading,
            draining=status.placement.draining,
            loaded_total=status.placement.loaded_total,
            given_up_total=status.placement.given_up_total,
            predicted=status.placement.predicted,
            realised=status.placement.realised,
        ),
    )


def status_from_wire(message: pb.StatusResponse) -> ClusterStatus:
    controller = message.controller
    return ClusterStatus(
        name=message.name,
        controller=ControllerInfo(
            pid=controller.pid,
            address=controller.address,
            node=controller.node,
            epoch=controller.epoch,
            version=controller.version,
            term=controller.term,
            metrics_address=controller.metrics_address,
            prometheus=controller.prometheus,
        ),
        ingresses=tuple(_ingress_from_wire(ingress) for ingress in message.ingresses),
        routers=tuple(_router_from_wire(router) for router in message.routers),
        hosts=tuple(_host_from_wire(host) for host in message.hosts),
        replicas_held=message.replicas_held,
        replicas_wanted=message.replicas_wanted,
        draining=message.draining,
        problems=tuple(message.problems),
        placement=_placing_from_wire(message.placement),
    )


def _placing_from_wire(message: pb.PlacementStatus) -> PlacementStatus:
    """What commands need of it; numbers by expert stay with the controller."""
    return PlacementStatus(
        rebalances=message.rebalances,
        held_by=message.held_by,
        is_moving=message.is_moving,
        loading=message.loading,
        draining=message.draining,
        loaded_total=message.loaded_total,
        given_up_total=message.given_up_total,
        predicted=message.predicted if message.HasField("predicted") else None,
        realised=message.realised if message.HasField("realised") else None,
    )


def keys_to_wire(keys: Iterable[ExpertKey]) -> list[pb.LayerExperts]:
    """One entry per layer: a thousand experts of ten layers take about a thousand bytes."""
    by_layer: defaultdict[int, list[int]] = defaultdict(list)
    for layer, expert in keys:
        by_layer[layer].append(expert)
    return [pb.LayerExperts(layer=layer, experts=sorted(by_layer[layer])) for layer in sorted(by_layer)]


def keys_from_wire(layers: Iterable[pb.LayerExperts]) -> frozenset[ExpertKey]:
    return frozenset((entry.layer, expert) for entry in layers for expert in entry.experts)


def placement_to_wire(placement: Placement) -> pb.Placement:
    names = sorted({name for hosts in placement.replicas.values() for name in hosts})
    index = {name: position for position, name in enumerate(names)}
    return pb.Placement(
        epoch=placement.epoch,
        host_names=names,
        replicas=[
            pb.Replica(layer=layer, expert=expert, hosts=[index[name] for name in hosts])
            for (layer, expert), hosts in placement.replicas.items()
        ],
    )


def placement_from_wire(message: pb.Placement) -> Placement:
    names = tuple(message.host_names)
    replicas: dict[ExpertKey, tuple[str, ...]] = {}
    for replica in message.replicas:
        if any(index >= len(names) for index in replica.hosts):
            raise ValueError(f"({replica.layer}, {replica.expert}) names a host that is not listed")
        replicas[(replica.layer, replica.expert)] = tuple(names[index] for index in replica.hosts)
    return Placement(epoch=message.epoch, replicas=MappingProxyType(replicas))


def _host_to_wire(host: HostInfo) -> pb.Host:
    return pb.Host(
        name=host.name,
        incarnation=host.incarnation,
        address=host.address,
        node=host.node,
        pid=host.pid,
        state=host.state,
        transport=host.transport,
        slots=host.slots,
        slots_target=host.slots_target,
        rows_total=host.rows_total,
        metrics_address=host.metrics_address,
        cost=_cost_to_wire(host.cost),
    )


def _host_from_wire(message: pb.Host) -> HostInfo:
    return HostInfo(
        name=message.name,
        incarnation=message.incarnation,
        address=message.address,
        node=message.node,
        pid=message.pid,
        state=message.state,
        transport=message.transport,
        slots=message.slots,
        slots_target=message.slots_target,
        rows_total=message.rows_total,
        metrics_address=message.metrics_address,
        cost=_cost_from_wire(message.cost) if message.HasField("cost") else None,
    )


def _cost_to_wire(cost: ComputeCost | None) -> pb.ComputeCost | None:
    return None if cost is None else pb.ComputeCost(per_expert_s=cost.per_expert_s, per_row_s=cost.per_row_s)


def _cost_from_wire(message: pb.ComputeCost) -> ComputeCost | None:
    """None for numbers that no cost can be: a router divides by them."""
    costs = (message.per_expert_s, message.per_row_s)
    if not all(isfinite(cost) and cost > 0 for cost in costs):
        return None
    return ComputeCost(per_expert_s=message.per_expert_s, per_row_s=message.per_row_s)


def _router_to_wire(router: RouterInfo) -> pb.Router:
    return pb.Router(
        name=router.name,
        address=router.address,
        node=router.node,
        pid=router.pid,
        state=router.state,
        running=router.running,
        waiting=router.waiting,
        metrics_address=router.metrics_address,
        max_model_len=router.max_model_len,
        kv_tokens=router.kv_tokens,
    )


def _router_from_wire(message: pb.Router) -> RouterInfo:
    return RouterInfo(
        name=message.name,
        address=message.address,
        node=message.node,
        pid=message.pid,
        state=message.state,
        running=message.running,
        waiting=message.waiting,
        metrics_address=message.metrics_address,
        max_model_len=message.max_model_len,
        kv_tokens=message.kv_tokens,
    )


def _ingress_to_wire(ingress: IngressInfo) -> pb.Ingress:
    return pb.Ingress(
        name=ingress.name,
        node=ingress.node,
        pid=ingress.pid,
        http=ingress.http,
        metrics_address=ingress.metrics_address,
    )


def _ingress_from_wire(message: pb.Ingress) -> IngressInfo:
    return IngressInfo(
        name=message.name,
        node=message.node,
        pid=message.pid,
        http=message.http,
        metrics_address=message.metrics_address,
    )
