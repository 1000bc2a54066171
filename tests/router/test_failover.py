"""The failover machine, as transcripts and on random traces."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from experts.placement import ExpertKey, Placement
from router.failover import Answered, Begin, DispatchState, Failed, Lose, Policy, Reach, Send, step

POLICY = Policy(base_s=1.0, per_row_s=0.5)


def reach(usable: str, **replicas: str) -> Reach:
    """`e3="ab"` places expert 3 of layer 0 on hosts a and b."""
    table: dict[ExpertKey, tuple[str, ...]] = {(0, int(name[1:])): tuple(hosts) for name, hosts in replicas.items()}
    return Reach(placement=Placement(epoch=1, replicas=table), usable=frozenset(usable))


def test_rows_of_one_host_travel_in_one_shipment_with_a_deadline_for_their_number() -> None:
    where = reach("ab", e0="a", e1="b", e2="a")
    state, effects = step(DispatchState(), Begin(rows={(0, 0): 2, (0, 1): 1, (0, 2): 3}), where, 10.0, POLICY)
    assert effects == [
        Send(shipment=0, host="a", keys=((0, 0), (0, 2)), deadline=10.0 + 1.0 + 2.5),
        Send(shipment=1, host="b", keys=((0, 1),), deadline=10.0 + 1.0 + 0.5),
    ]
    state, effects = step(state, Answered(shipment=0), where, 10.1, POLICY)
    assert effects == []
    assert list(state.waiting) == [1]


def test_replicas_share_the_load_by_cost() -> None:
    where = reach("ab", e0="ab", e1="ab", e2="ab", e3="ab")
    _, effects = step(DispatchState(), Begin(rows={(0, e): 1 for e in range(4)}), where, 0.0, POLICY)
    assert [(send.host, len(send.keys)) for send in effects if isinstance(send, Send)] == [("a", 2), ("b", 2)]


def test_a_failed_shipment_goes_to_another_replica_and_then_is_lost() -> None:
    where = reach("ab", e0="ab", e1="a")
    state, effects = step(DispatchState(), Begin(rows={(0, 0): 9, (0, 1): 1}), where, 0.0, POLICY)
    assert {effect.host for effect in effects if isinstance(effect, Send)} == {"a", "b"} or len(effects) == 1
    first = next(effect for effect in effects if isinstance(effect, Send) and effect.host == "a")
    state, effects = step(state, Failed(shipment=first.shipment), where, 1.0, POLICY)
    lost = [key for effect in effects if isinstance(effect, Lose) for key in effect.keys]
    assert (0, 1) in lost
    resent = [effect for effect in effects if isinstance(effect, Send)]
    assert all(effect.host == "b" for effect in resent)
    for effect in resent:
        state, effects = step(state, Failed(shipment=effect.shipment), where, 2.0, POLICY)
        assert all(isinstance(effect, Lose) for effect in effects)


def test_an_expert_nobody_serves_is_lost_at_once_and_the_others_go() -> None:
    where = reach("a", e0="a", e1="b")
    state, effects = step(DispatchState(), Begin(rows={(0, 0): 1, (0, 1): 1}), where, 0.0, POLICY)
    assert [type(effect) for effect in effects] == [Send, Lose]
    assert effects[1] == Lose(keys=((0, 1),))
    assert list(state.waiting) == [0]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_every_key_ends_answered_or_lost_within_bounds(data: st.DataObject) -> None:
    hosts = "abcd"
    replicas = {
        (0, expert): tuple(data.draw(st.lists(st.sampled_from(hosts), unique=True), label=f"e{expert}"))
        for expert in range(data.draw(st.integers(1, 5)))
    }
    placement = Placement(epoch=1, replicas=replicas)
    draw_usable = st.sets(st.sampled_from(hosts))
    state, pending, done, sends = DispatchState(), [], set(), []

    def take(event: Begin | Answered | Failed) -> None:
        nonlocal state
        where = Reach(placement=placement, usable=frozenset(data.draw(draw_usable, label="usable")))
        state, effects = step(state, event, where, 0.0, POLICY)
        for effect in effects:
            if isinstance(effect, Send):
                assert effect.host in where.usable
                assert all(effect.host in replicas[key] for key in effect.keys)
                pending.append(effect)
                sends.append(effect)
            else:
                assert not done & set(effect.keys)
                done.update(effect.keys)

    take(Begin(rows=dict.fromkeys(replicas, 1)))
    while pending:
        send = pending.pop(data.draw(st.integers(0, len(pending) - 1), label="which"))
        if data.draw(st.booleans(), label="answered"):
            assert not done & set(send.keys)
            done.update(send.keys)
            take(Answered(shipment=send.shipment))
        else:
            take(Failed(shipment=send.shipment))
    assert done == set(replicas)
    assert not state.waiting
    for key, serving in replicas.items():
        visited = [send.host for send in sends if key in send.keys]
        assert len(visited) == len(set(visited)) <= len(serving)
