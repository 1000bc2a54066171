"""Views, reports, orders and status survive the wire, whatever they hold."""

from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.placement import ClusterView, ComputeCost, HostInfo, IngressInfo, Placement, RouterInfo
from experts.reports import ClusterStatus, ControllerInfo, HostOrder, HostReport, MemberKind, MemberReport
from experts.wire import control_pb2 as pb
from experts.wire.view import (
    host_report_from_wire,
    host_report_to_wire,
    keys_to_wire,
    member_report_from_wire,
    member_report_to_wire,
    order_from_wire,
    order_to_wire,
    status_from_wire,
    status_to_wire,
    view_from_wire,
    view_to_wire,
)

names = st.text(min_size=1, max_size=6)
small = st.integers(0, 2**31)
large = st.integers(0, 2**63)
keys = st.tuples(st.integers(0, 200), st.integers(0, 500))
seconds = st.floats(1e-9, 1e3)
costs = st.none() | st.builds(ComputeCost, per_expert_s=seconds, per_row_s=seconds)
reports = st.builds(
    HostReport,
    cost=costs,
    name=names,
    incarnation=large,
    address=names,
    node=names,
    pid=small,
    metrics_address=names,
    transport=names,
    held=st.frozensets(keys, max_size=30),
    held_bytes=large,
    rows_total=large,
    problem=names,
)
hosts = st.builds(
    HostInfo, name=names, incarnation=large, address=names, pid=small, slots=small, rows_total=large, cost=costs
)
routers = st.builds(
    RouterInfo, name=names, address=names, running=small, waiting=small, max_model_len=small, kv_tokens=large
)
ingresses = st.builds(IngressInfo, name=names, http=names, pid=small)
placements = st.builds(
    Placement,
    epoch=large,
    replicas=st.dictionaries(keys, st.lists(names, min_size=1, max_size=3, unique=True).map(tuple), max_size=20),
)


def by_name(items: list[Any]) -> Any:
    return MappingProxyType({item.name: item for item in items})


views = st.builds(
    ClusterView,
    version=large,
    placement=placements,
    hosts=st.lists(hosts, max_size=4).map(by_name),
    routers=st.lists(routers, max_size=4).map(by_name),
    draining=st.booleans(),
)
members = st.builds(
    MemberReport,
    kind=st.sampled_from(MemberKind),
    name=names,
    address=names,
    pid=small,
    running=small,
    view_version=large,
    view_epoch=large,
    inner_host=st.none() | reports,
    problem=names,
    max_model_len=small,
    kv_tokens=large,
)
statuses = st.builds(
    ClusterStatus,
    name=names,
    controller=st.builds(ControllerInfo, pid=small, address=names, epoch=large, version=large, term=large),
    ingresses=st.lists(ingresses, max_size=3).map(tuple),
    routers=st.lists(routers, max_size=3).map(tuple),
    hosts=st.lists(hosts, max_size=3).map(tuple),
    replicas_held=small,
    problems=st.lists(names, max_size=3).map(tuple),
)


@settings(deadline=None, max_examples=60)
@given(views)
def test_views(view: ClusterView) -> None:
    assert view_from_wire(pb.ClusterView.FromString(view_to_wire(view).SerializeToString())) == view


@settings(deadline=None, max_examples=60)
@given(reports, members, statuses)
def test_reports_and_status(report: HostReport, member: MemberReport, status: ClusterStatus) -> None:
    assert host_report_from_wire(host_report_to_wire(report)) == report
    assert member_report_from_wire(member_report_to_wire(member)) == member
    assert status_from_wire(status_to_wire(status)) == status


@settings(deadline=None, max_examples=60)
@given(st.frozensets(keys), st.booleans())
def test_orders(target: frozenset[tuple[int, int]], retire: bool) -> None:
    order = HostOrder(target=target, retire=retire)
    assert order_from_wire(order_to_wire(order)) == order


def test_a_heartbeat_is_no_order() -> None:
    assert order_from_wire(pb.HostOrder()) is None


def test_a_host_index_out_of_range_is_refused() -> None:
    message = pb.ClusterView(placement=pb.Placement(replicas=[pb.Replica(layer=1, expert=2, hosts=[0])]))
    with pytest.raises(ValueError, match="not listed"):
        view_from_wire(message)


def test_a_thousand_experts_take_about_a_thousand_bytes() -> None:
    report = pb.HostReport(held=keys_to_wire((layer, expert) for layer in range(10) for expert in range(100)))
    assert report.ByteSize() < 1200


def test_a_cost_that_cannot_be_is_none() -> None:
    for wrong in (float("nan"), float("inf"), 0.0, -1.0):
        report = pb.HostReport(name="a", cost=pb.ComputeCost(per_expert_s=1e-4, per_row_s=wrong))
        assert host_report_from_wire(report).cost is None
