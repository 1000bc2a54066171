"""What a shift brought, told from counters; and that a bench of it refuses what it cannot do."""

from __future__ import annotations

import asyncio

import pytest

from cluster.control.draft import Replica
from cluster.drill.hot_rows import Sight, imbalance, look, new_replicas, share_of
from cluster.drill.hot_set import ShiftSettings, bench_shift
from experts.errors import InvalidInput
from experts.reports import CountedRows

HOSTS = ("a", "b", "c")


def sight(at: float, **rows: int) -> Sight:
    """Rows of replicas such as `e1_a`: of expert 1 on host a, in layer 0."""
    found: dict[Replica, int] = {((0, int(name[1])), name[3]): total for name, total in rows.items()}
    return Sight(at=at, rows=found, hosts=HOSTS)


def test_lives_of_a_host_are_counted_together_and_idle_ones_are_hosts() -> None:
    lives = [
        CountedRows(host="a", incarnation=1, rows={(0, 1): 5}),
        CountedRows(host="a", incarnation=2, rows={(0, 1): 7}),
        CountedRows(host="b", incarnation=1, rows={}),
    ]
    seen = look(lambda: lives)
    assert dict(seen.rows) == {((0, 1), "a"): 12}
    assert seen.hosts == ("a", "b")


def test_a_replica_is_new_when_it_works_long_after_the_others() -> None:
    sights = [
        sight(0.0, e0_a=10),
        sight(10.0, e0_a=90),
        sight(11.0, e0_a=95, e1_b=20),
        sight(14.0, e0_a=95, e1_b=60, e1_a=5),
        sight(16.0, e0_a=95, e1_b=80, e1_a=25, e2_c=9),
        sight(17.0, e0_a=96, e1_b=90, e1_a=35, e1_c=1),
    ]
    assert new_replicas(sights, 10.0, [(0, 1)]) == {((0, 1), "a"): 4.0, ((0, 1), "c"): 7.0}


def test_imbalance_is_of_the_worst_layer_over_all_hosts() -> None:
    assert imbalance(sight(0.0), sight(1.0, e0_a=30, e1_b=30, e2_c=30)) == 1.0
    assert imbalance(sight(0.0, e0_a=100), sight(1.0, e0_a=160, e1_b=30)) == pytest.approx(2.0)
    assert imbalance(sight(0.0), sight(1.0)) == 1.0
    worse = Sight(at=1.0, rows={((0, 0), "a"): 1, ((0, 1), "b"): 1, ((0, 2), "c"): 1, ((1, 0), "c"): 8}, hosts=HOSTS)
    assert imbalance(sight(0.0), worse) == pytest.approx(3.0)


def test_shares_are_of_rows_between_two_sights() -> None:
    assert share_of(sight(0.0, e0_a=100), sight(1.0, e0_a=130, e1_b=60, e2_c=10), [0, 2]) == pytest.approx(0.4)
    assert share_of(sight(0.0), sight(1.0), [0]) == 0.0


def test_half_of_the_experts_at_most_are_hot() -> None:
    settings = ShiftSettings(url="http://127.0.0.1:1", model="m", hot=3)
    keys = frozenset((layer, expert) for layer in range(2) for expert in range(5))
    with pytest.raises(InvalidInput, match=r"hot: must be at most half of the model's 5 experts .got 3"):
        asyncio.run(bench_shift(settings, range(100), lambda: ([], keys)))


@pytest.mark.parametrize(("field", "value"), [("streams", 0), ("hot", 0), ("before_s", 3.0), ("after_s", 1e9)])
def test_settings_that_make_no_sense_are_named(field: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=field):
        ShiftSettings(url="http://127.0.0.1:1", model="m", **{field: value})  # type: ignore[arg-type]
