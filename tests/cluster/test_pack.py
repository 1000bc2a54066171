"""The initial placement: complete, on distinct hosts, balanced, and spread."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control.pack import pack, spread, target_by_host
from cluster.control.rehome import rehome
from experts.errors import InvalidInput


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], int, list[str], int]:
    layers = draw(st.lists(st.integers(0, 60), unique=True, max_size=12))
    num_hosts = draw(st.integers(1, 9))
    hosts = [f"host-{index}" for index in range(num_hosts)]
    return layers, draw(st.integers(1, 20)), hosts, draw(st.integers(1, num_hosts))


@settings(deadline=None, max_examples=150)
@given(shapes())
def test_every_expert_has_its_replicas_and_hosts_are_balanced(
    shape: tuple[list[int], int, list[str], int],
) -> None:
    layers, num_experts, hosts, num_replicas = shape
    placement = pack(layers=layers, num_experts=num_experts, hosts=hosts, num_replicas=num_replicas)
    assert set(placement) == {(layer, expert) for layer in layers for expert in range(num_experts)}
    for names in placement.values():
        assert len(set(names)) == num_replicas == len(names)
        assert set(names) <= set(hosts)
    for layer in layers:
        here = Counter(name for key, names in placement.items() if key[0] == layer for name in names)
        assert _spread(here, hosts) <= 1
    assert _spread(Counter(name for names in placement.values() for name in names), hosts) <= 1


def test_the_replicas_of_one_host_are_spread_over_all_others() -> None:
    hosts = ["a", "b", "c", "d"]
    placement = pack(layers=range(48), num_experts=16, hosts=hosts, num_replicas=2)
    partners = Counter(other for names in placement.values() if "a" in names for other in names if other != "a")
    assert set(partners) == {"b", "c", "d"}
    assert max(partners.values()) - min(partners.values()) <= 0.1 * sum(partners.values())


def test_the_same_numbers_give_the_same_placement() -> None:
    def once() -> dict[tuple[int, int], tuple[str, ...]]:
        return pack(layers=[1, 3], num_experts=5, hosts=["a", "b", "c"], num_replicas=2)

    assert once() == once()


@pytest.mark.parametrize("num_replicas", [0, 3, -1])
def test_more_replicas_than_hosts_are_refused(num_replicas: int) -> None:
    with pytest.raises(InvalidInput) as caught:
        pack(layers=[0], num_experts=2, hosts=["a", "b"], num_replicas=num_replicas)
    assert caught.value.field == "replicas"
    assert "2" in caught.value.rule


def test_targets_list_hosts_that_hold_nothing() -> None:
    placement = pack(layers=[4], num_experts=1, hosts=["a", "b"], num_replicas=1)
    assert target_by_host(placement, ["a", "b"]) == {"a": frozenset({(4, 0)}), "b": frozenset()}


def _spread(held: Counter[str], hosts: list[str]) -> int:
    counts = [held[host] for host in hosts]
    return max(counts) - min(counts)


@settings(deadline=None, max_examples=100)
@given(shapes(), st.data())
def test_replicas_are_on_as_many_nodes_as_there_are(
    shape: tuple[list[int], int, list[str], int], data: st.DataObject
) -> None:
    layers, num_experts, hosts, num_replicas = shape
    nodes = {host: data.draw(st.sampled_from("abc"), label=host) for host in hosts}
    target = pack(layers=layers, num_experts=num_experts, hosts=hosts, num_replicas=num_replicas)
    for names in spread(target, nodes).values():
        assert len(set(names)) == num_replicas
        assert len({nodes[name] for name in names}) == min(num_replicas, len(set(nodes.values())))


@settings(deadline=None, max_examples=150)
@given(shapes(), st.data())
def test_the_experts_of_hosts_that_are_away_find_other_homes(
    shape: tuple[list[int], int, list[str], int], data: st.DataObject
) -> None:
    layers, num_experts, hosts, num_replicas = shape
    target = pack(layers=layers, num_experts=num_experts, hosts=hosts, num_replicas=num_replicas)
    away = frozenset(data.draw(st.sets(st.sampled_from(hosts)), label="away"))
    present = [host for host in hosts if host not in away]
    wanted = rehome(target, away, hosts)
    assert set(wanted) == set(target)
    if not present:
        assert wanted == target
        return
    for key, names in wanted.items():
        assert len(set(names)) == len(names) == min(num_replicas, len(present))
        assert not away & set(names)
        assert set(target[key]) - away <= set(names), "nobody who has it loses it"
    for layer in layers:
        here = Counter(name for key, names in wanted.items() if key[0] == layer for name in names)
        assert _spread(here, present) <= 1 + len(away)
