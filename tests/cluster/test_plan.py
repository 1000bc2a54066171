"""What plans do and leave alone, and why they say so."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control.balance import LayerBalance
from cluster.control.explain import as_json, as_text
from cluster.control.fleet import Fleet, HostSpec, Load
from cluster.control.pack import pack
from cluster.control.plan import Plan, PlanState, Policy, plan
from cluster.control.replicas import Replicas
from cluster.control.scale import Scaling
from experts.errors import InvalidInput
from experts.placement import ExpertKey

NOW = Policy(settle_s=0.0)


def fleet_of(num_hosts: int, slots: int, **more: float) -> Fleet:
    return Fleet.of([HostSpec(name=f"h{host}", slots=slots, **more) for host in range(num_hosts)], 100)


def packed(fleet: Fleet, num_layers: int, num_experts: int) -> Replicas:
    return pack(layers=range(num_layers), num_experts=num_experts, hosts=list(fleet.hosts), num_replicas=1)


def load_of(placement: Replicas, hot: Mapping[ExpertKey, float], at: float = 0.0, **more: object) -> Load:
    return Load(at=at, rows={key: hot.get(key, 100.0) for key in placement}, **more)  # type: ignore[arg-type]


def one(load: Load | None, fleet: Fleet, placement: Replicas, policy: Policy = NOW, now: float = 0.0) -> Plan:
    return plan(load, fleet, placement, policy, PlanState(), now)[0]


def check(made: Plan, fleet: Fleet, keys: Replicas) -> None:
    assert made.target.keys() == keys.keys()
    held = dict.fromkeys(fleet.hosts, 0)
    for key, names in made.target.items():
        assert names, f"{key} is nowhere"
        assert len(set(names)) == len(names)
        for name in names:
            held[name] += 1
    assert all(held[name] <= fleet.hosts[name].slots for name in held), held


def test_an_even_load_changes_nothing() -> None:
    fleet = fleet_of(4, 5)
    placement = packed(fleet, 1, 16)
    made = one(load_of(placement, {}), fleet, placement)
    assert not made.is_change
    assert made.target is placement
    assert made.why == "every layer is as even as it has to be"
    assert as_text(made).startswith("no change\n")


def test_a_hot_expert_gets_replicas_and_little_else_moves() -> None:
    fleet = fleet_of(4, 5)
    placement = packed(fleet, 1, 16)
    made = one(load_of(placement, {(0, 0): 2000.0}), fleet, placement)
    check(made, fleet, placement)
    assert len(made.target[0, 0]) >= 3
    assert len(made.loads) <= 6
    [note] = made.layers
    assert note.before is not None
    assert note.before > 2.0
    assert note.after <= 1.2
    assert made.hottest[0] == ((0, 0), 2000.0)
    assert made.moved_bytes == 100 * len(made.loads)
    assert "layer 0: imbalance" in as_text(made)
    assert as_json(made)["moved_bytes"] == made.moved_bytes


def test_an_imbalance_has_to_last() -> None:
    fleet = fleet_of(4, 5)
    placement = packed(fleet, 1, 16)
    state, policy = PlanState(), Policy(settle_s=2.0)
    for now, expected in ((0.0, False), (1.0, False), (2.0, True)):
        made, state = plan(load_of(placement, {(0, 0): 2000.0}, at=now), fleet, placement, policy, state, now)
        assert made.is_change is expected, made.why


def test_chance_is_no_imbalance() -> None:
    fleet = fleet_of(4, 5)
    placement = packed(fleet, 1, 16)
    uneven = {(0, 0): 0.6}
    few = Load(at=0.0, rows={key: uneven.get(key, 0.2) for key in placement}, window_s=5.0)
    many = Load(at=0.0, rows={key: 1000.0 * rows for key, rows in few.rows.items()}, window_s=5.0)
    assert not one(few, fleet, placement).is_change
    assert one(many, fleet, placement).is_change


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda load: None, "no load was measured"),
        (lambda load: replace(load, at=-100.0), "100 s old"),
        (lambda load: replace(load, at=100.0), "from 100 s ahead"),
        (lambda load: replace(load, at=math.nan), "no time"),
        (lambda load: replace(load, window_s=0.0), "no time"),
        (lambda load: replace(load, dispatches=math.nan), "dispatches"),
        (lambda load: replace(load, rows={**load.rows, (0, 1): math.nan}), "nan rows per second of expert 1"),
        (lambda load: replace(load, rows={**load.rows, (0, 1): -1.0}), "-1.0 rows per second"),
        (lambda load: replace(load, rows={**load.rows, (0, 1): math.inf}), "inf rows per second"),
        (lambda load: replace(load, rows={**load.rows, (0, 99): 1.0}), "(0, 99)"),
        (lambda load: replace(load, rows=dict(list(load.rows.items())[:-1])), "no rows were read of 1 experts"),
        (lambda load: replace(load, rows={}), "no rows were read of 16 experts"),
    ],
)
def test_what_cannot_be_trusted_holds_everything(spoil: object, why: str) -> None:
    fleet = fleet_of(4, 5)
    placement = packed(fleet, 1, 16)
    load = spoil(load_of(placement, {(0, 0): 5000.0}, busy=dict.fromkeys(fleet.hosts, 0.0), queue_s=0.0))  # type: ignore[operator]
    policy = Policy(settle_s=0.0, scaling=Scaling(down_after_s=0.0))
    made = one(load, fleet, placement, policy)
    assert not made.is_change
    assert made.size.hosts == 4
    assert not made.size.drain
    assert why in made.held_by
    assert why in as_text(made)
    assert made.alarms


def test_a_lost_host_and_no_load_still_place_every_expert() -> None:
    fleet = fleet_of(3, 6)
    placement = {key: tuple(name for name in names if name != "h1") for key, names in packed(fleet, 1, 12).items()}
    rest = Fleet.of([host for host in fleet.hosts.values() if host.name != "h1"], 100)
    made = one(None, rest, placement)
    check(made, rest, placement)
    assert len(made.loads) == 4
    assert not made.evictions


def test_a_drained_host_is_emptied_and_may_go() -> None:
    fleet = fleet_of(4, 6)
    placement = packed(fleet, 2, 8)
    hosts = [replace(host, draining=host.name == "h2") for host in fleet.hosts.values()]
    made = one(load_of(placement, {}), Fleet.of(hosts), placement)
    check(made, fleet, placement)
    assert not any("h2" in names for names in made.target.values())
    after = one(load_of(placement, {}), Fleet.of(hosts), made.target)
    assert after.size.release == ("h2",)
    assert not after.is_change


def test_too_little_room_says_so_and_takes_nothing_away() -> None:
    fleet = fleet_of(2, 4)
    placement = packed(fleet, 1, 8)
    hosts = [replace(host, draining=host.name == "h1") for host in fleet.hosts.values()]
    made = one(load_of(placement, {}), Fleet.of(hosts), placement)
    assert any("no room" in alarm for alarm in made.alarms)
    check(made, fleet, placement)


def test_a_new_host_gets_its_share() -> None:
    fleet = fleet_of(3, 8)
    placement = packed(fleet, 1, 12)
    more = fleet_of(4, 8)
    made = one(load_of(placement, {}), more, placement)
    check(made, more, placement)
    assert 2 <= sum("h3" in names for names in made.target.values()) <= 8
    assert made.layers[0].after <= 1.06


def test_slow_hosts_get_less_and_far_hosts_are_slow() -> None:
    for slow in ({"row_s": 3.0}, {"link_s": 2.0}):
        hosts = [HostSpec(name="fast", slots=12), HostSpec(name="slow", slots=12, **slow)]
        hosts = [replace(host, slot_price=10.0) for host in hosts]
        made = one(
            load_of(dict.fromkeys([(0, expert) for expert in range(12)], ()), {}),
            Fleet.of(hosts),
            {(0, expert): () for expert in range(12)},
        )
        assert made.layers[0].after <= 1.1
        alone = {name: sum(names == (name,) for names in made.target.values()) for name in ("fast", "slow")}
        assert alone["fast"] > alone["slow"]


def test_hosts_take_turns_with_few_rows_and_share_many_at_the_price_of_another_read() -> None:
    def seconds(rows: float, copies: int) -> float:
        """Of all work for one expert, of which each of 100 dispatches a second has rows."""
        hosts = [HostSpec(name=f"h{host}", slots=4, row_s=1e-6, touch_s=1e-3) for host in range(4)]
        balance = LayerBalance([rows], [list(range(copies))], hosts, 100.0)
        return sum(balance.best)

    assert seconds(2e3, 4) == pytest.approx(seconds(2e3, 1), rel=0.1), "20 rows at a time: read once, by one of four"
    # A million rows at a time: all four have some of each dispatch, and read the weights for them.
    assert seconds(1e8, 4) - seconds(1e8, 1) == pytest.approx(3 * 100 * 1e-3, rel=0.01)


def test_a_hot_expert_is_worth_copies_that_take_turns() -> None:
    # Where each dispatch reads weights for much longer than it computes rows.
    hosts = [HostSpec(name=f"h{host}", slots=4, row_s=1e-6, touch_s=1e-3) for host in range(4)]
    fleet = Fleet.of(hosts)
    placement = packed(fleet, 1, 8)
    load = replace(load_of(placement, {(0, 0): 800.0, (0, 4): 800.0}), rows=dict.fromkeys(placement, 0.0))
    load = replace(load, rows={**load.rows, (0, 0): 800.0, (0, 4): 800.0}, dispatches=100.0)
    made = one(load, fleet, placement)
    assert made.layers[0].after <= 1.05


def test_replicas_are_spread_over_nodes() -> None:
    hosts = [HostSpec(name=f"h{host}", slots=8, node=f"n{host % 2}") for host in range(4)]
    fleet = Fleet.of(hosts)
    keys: Replicas = {(0, expert): () for expert in range(16)}
    made = one(load_of(keys, {}), fleet, keys, Policy(min_replicas=2))
    for names in made.target.values():
        assert {fleet.hosts[name].node for name in names} == {"n0", "n1"}


def test_room_that_others_want_is_left_to_them() -> None:
    keys: Replicas = {(0, expert): () for expert in range(8)}
    load = load_of(keys, {(0, 0): 1000.0})
    counts = []
    for price in (0.0, 0.05, 10.0):
        made = one(load, fleet_of(4, 6, slot_price=price), keys)
        counts.append(sum(len(names) for names in made.target.values()))
    assert counts[0] == 24
    assert 8 < counts[1] < 24
    assert counts[2] == 8


def test_replicas_follow_the_load_of_layers_under_one_budget() -> None:
    keys: Replicas = {(layer, expert): () for layer in range(2) for expert in range(8)}
    load = load_of(keys, {(1, 0): 2000.0, (1, 1): 1000.0})
    made = one(load, fleet_of(4, 6), keys)
    copies = [sum(len(names) for (of, _), names in made.target.items() if of == layer) for layer in range(2)]
    assert copies[1] > copies[0]
    assert max(note.after for note in made.layers) <= 1.2


def test_what_was_changed_stays_for_the_cool_down() -> None:
    fleet = fleet_of(4, 5)
    placement = packed(fleet, 1, 16)
    state = PlanState()
    first, state = plan(load_of(placement, {(0, 0): 3000.0}), fleet, placement, NOW, state, 0.0)
    assert first.is_change
    for now in (1.0, 15.0, NOW.cool_down_s - 1.0):
        other, state = plan(load_of(placement, {(0, 9): 3000.0}, at=now), fleet, first.target, NOW, state, now)
        back = set(other.evictions) & set(first.loads), set(other.loads) & set(first.evictions)
        assert back == (set(), set())
        first = replace(first, target=other.target)


def scaled(busy: float, queue_s: float, seconds: float, num_hosts: int = 4, scaling: Scaling | None = None) -> Plan:
    fleet = fleet_of(num_hosts, 16)
    placement = packed(fleet, 1, 16)
    policy = Policy(settle_s=0.0, scaling=scaling or Scaling(up_after_s=30.0, down_after_s=600.0))
    state, now = PlanState(), 0.0
    while True:
        load = load_of(placement, {}, at=now, busy=dict.fromkeys(fleet.hosts, busy), queue_s=queue_s)
        made, state = plan(load, fleet, placement, policy, state, now)
        if now >= seconds:
            return made
        now += 5.0


def test_the_number_of_hosts_follows_sustained_use() -> None:
    assert scaled(0.95, 0.0, 25.0).size.hosts == 4
    assert scaled(0.95, 0.0, 30.0).size.hosts == 7
    assert scaled(0.95, 0.0, 30.0, scaling=Scaling(max_hosts=5)).size.hosts == 5
    assert scaled(0.5, 10.0, 30.0).size.hosts == 5, "busy enough, and requests wait"
    assert scaled(0.1, 10.0, 30.0).size.hosts == 4, "it is not hosts that requests wait for"
    assert scaled(0.1, 0.0, 595.0).size.drain == ()
    assert scaled(0.1, 0.0, 600.0).size.drain == ("h3",)
    assert scaled(0.1, 0.0, 600.0, num_hosts=1).size.drain == ()
    assert scaled(0.5, 0.0, 600.0).size.drain == (), "three hosts would be too busy"
    assert scaled(0.1, 0.0, 600.0, scaling=Scaling(min_hosts=4)).size.drain == ()
    assert scaled(0.9, 0.0, 0.0, num_hosts=2, scaling=Scaling(min_hosts=3)).size.hosts == 3
    for spoiled in (math.nan, -1.0, 7.0):
        held = scaled(spoiled, 0.0, 900.0)
        assert (held.size.hosts, held.size.drain) == (4, ())
        assert "cannot be busy" in held.size.why


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidInput, match="min_gain"):
        Policy(min_gain=math.nan)
    with pytest.raises(InvalidInput, match="row_s"):
        HostSpec(name="h", slots=1, row_s=-1.0)
    with pytest.raises(InvalidInput, match="target"):
        Scaling(target=0.9, high=0.8)
    with pytest.raises(InvalidInput, match="placement"):
        one(None, fleet_of(1, 1), {})


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_plan_for_any_fleet_and_load_is_sound(data: st.DataObject) -> None:
    num_hosts, num_layers = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    num_experts = data.draw(st.integers(1, 9))
    costs = st.sampled_from([0.0, 1e-6, 1.0])
    hosts = [
        HostSpec(
            name=f"h{host}",
            slots=data.draw(st.integers(0, 12)),
            row_s=data.draw(st.sampled_from([1e-6, 1.0, 2.5])),
            touch_s=data.draw(costs),
            link_s=data.draw(costs),
            node=data.draw(st.sampled_from(["a", "b"])),
            slot_price=data.draw(st.sampled_from([0.0, 0.1])),
            draining=data.draw(st.sampled_from([False, False, False, True])),
        )
        for host in range(num_hosts)
    ]
    fleet = Fleet.of(hosts)
    room = sum(host.slots for host in hosts if not host.draining)
    if room < num_layers * num_experts or not fleet.staying:
        return
    rates = st.sampled_from([0.0, 1e-9, 1.0, 50.0, 1e4, 1e9])
    keys: Replicas = {(layer, expert): () for layer in range(num_layers) for expert in range(num_experts)}
    state = PlanState()
    placement, now = keys, 0.0
    for _ in range(3):
        load = Load(
            at=now, rows={key: data.draw(rates) for key in keys}, dispatches=data.draw(st.sampled_from([0.0, 40.0]))
        )
        made, state = plan(load, fleet, placement, NOW, state, now)
        check(made, fleet, keys)
        assert not any(fleet.hosts[name].draining for names in made.target.values() for name in names)
        assert as_text(made)
        assert as_json(made)
        placement, now = made.target, now + 100.0


def test_no_expert_gets_a_second_replica_before_every_one_has_its_first() -> None:
    # Host h2 is gone, and what is left has room for four: of each expert there can be one.
    fleet = fleet_of(2, 2)
    policy = replace(NOW, min_replicas=2)
    for placement in (
        {(0, 0): ("h0",), (0, 1): ("h1",), (0, 2): (), (0, 3): ()},
        {(0, 0): ("h0", "h1"), (0, 1): ("h0", "h1"), (0, 2): (), (0, 3): ()},
        {(0, 0): (), (0, 1): (), (0, 2): (), (0, 3): ()},
    ):
        made = one(None, fleet, placement, policy)
        check(made, fleet, placement)
        assert made.alarms


def test_a_layer_that_gives_way_to_a_hotter_one_is_told_to_become_slower() -> None:
    hosts = [HostSpec(name="slow", slots=2, row_s=10.0), HostSpec(name="fast", slots=2)]
    placement = {(0, 0): ("slow",), (0, 1): ("slow",), (1, 0): ("fast",), (1, 1): ("fast",)}
    load = Load(at=0.0, rows={(0, 0): 10000.0, (0, 1): 0.0, (1, 0): 10.0, (1, 1): 10.0})
    made = one(load, Fleet.of(hosts), placement)
    assert made.target[0, 0] == ("fast",)
    assert made.layers[0].why.endswith("% faster")
    assert made.layers[1].why.startswith("it gives way to other layers: its slowest host becomes ")
    assert made.layers[1].why.endswith("% slower")


def test_where_hosts_that_stay_have_no_room_at_all_the_others_keep_what_they_have() -> None:
    fleet = Fleet.of([HostSpec(name="leaves", slots=2, draining=True), HostSpec(name="full", slots=0)])
    placement = {(0, 0): ("leaves",), (0, 1): ("leaves",)}
    made = one(load_of(placement, {(0, 0): 2000.0}), fleet, placement)
    assert not made.is_change
    assert len(made.alarms) == 2


def test_a_layer_gets_the_slots_that_others_have_for_nothing() -> None:
    """All slots are taken, and half of them by replicas of experts that nobody asks for."""
    fleet = fleet_of(4, 4)
    placement: dict[ExpertKey, tuple[str, ...]] = {(0, expert): (f"h{expert}",) for expert in range(4)}
    placement |= {(1, expert): (f"h{expert}", f"h{(expert + 1) % 4}", f"h{(expert + 2) % 4}") for expert in range(4)}
    load = load_of(placement, {(0, 0): 4000.0, **{(1, expert): 0.0 for expert in range(1, 4)}, (1, 0): 1.0})
    made = one(load, fleet, placement)
    check(made, fleet, placement)
    assert made.layers[0].before is not None
    assert made.layers[0].before > 3.0
    assert made.layers[0].after <= 1.1
    # What nobody needed stays where it is: an even load frees nothing.
    even = one(load_of(placement, {}), fleet, placement)
    assert not even.is_change
