"""What commands ask of the placement, as protobuf messages and back; knows no channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from experts.errors import InvalidInput
from experts.placement import ExpertKey, Placement
from experts.reports import AppliedPlan, CountedRows
from experts.wire import control_pb2 as pb
from experts.wire.view import placement_from_wire, placement_to_wire, rows_from_wire, rows_to_wire

Replicas = Mapping[ExpertKey, tuple[str, ...]]


def refusal_to_wire(error: InvalidInput) -> pb.Refusal:
    return pb.Refusal(field=error.field, value=str(error.value)[:500], rule=error.rule)


def raise_refusal(message: pb.Refusal) -> None:
    """Raises the InvalidInput that `message` tells of; nothing happens when it is empty."""
    if message.field:
        raise InvalidInput(message.field, message.value, message.rule)


def rates_to_wire(rates: Mapping[ExpertKey, float]) -> list[pb.LayerRates]:
    layers: dict[int, pb.LayerRates] = {}
    for (layer, expert), rate in sorted(rates.items()):
        message = layers.setdefault(layer, pb.LayerRates(layer=layer))
        message.experts.append(expert)
        message.rows_per_s.append(rate)
    return list(layers.values())


def rates_from_wire(messages: Iterable[pb.LayerRates]) -> dict[ExpertKey, float]:
    """Raises ValueError when the two lists of a message are not as long."""
    return {
        (message.layer, expert): rate
        for message in messages
        for expert, rate in zip(message.experts, message.rows_per_s, strict=True)
    }


def replicas_to_wire(replicas: Replicas) -> pb.Placement:
    return placement_to_wire(Placement(replicas=replicas))


def replicas_from_wire(message: pb.Placement) -> Replicas:
    """Raises ValueError when a replica names a host index that the message does not have."""
    return placement_from_wire(message).replicas


def plan_to_wire(plan: AppliedPlan) -> pb.AppliedPlan:
    return pb.AppliedPlan(
        age_s=plan.age_s,
        epoch=plan.epoch,
        loads=plan.loads,
        moved_bytes=plan.moved_bytes,
        before=plan.before,
        predicted=plan.predicted,
        realised=plan.realised,
        took_s=plan.took_s,
        why=plan.why,
        is_undone=plan.is_undone,
    )


def plan_from_wire(message: pb.AppliedPlan) -> AppliedPlan:
    return AppliedPlan(
        age_s=message.age_s,
        epoch=message.epoch,
        loads=message.loads,
        moved_bytes=message.moved_bytes,
        before=message.before if message.HasField("before") else None,
        predicted=message.predicted if message.HasField("predicted") else None,
        realised=message.realised if message.HasField("realised") else None,
        took_s=message.took_s if message.HasField("took_s") else None,
        why=message.why,
        is_undone=message.is_undone,
    )


def counted_to_wire(counted: CountedRows) -> pb.RowsResponse.Counted:
    return pb.RowsResponse.Counted(host=counted.host, incarnation=counted.incarnation, rows=rows_to_wire(counted.rows))


def counted_from_wire(message: pb.RowsResponse.Counted) -> CountedRows:
    return CountedRows(host=message.host, incarnation=message.incarnation, rows=rows_from_wire(message.rows))
