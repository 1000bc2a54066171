"""How patience grows with false alarms and comes back."""

from router.patience import CALM_S, LIMIT, Patience


def test_false_alarms_double_it_up_to_a_limit_and_calm_halves_it() -> None:
    patience = Patience(0.5)
    assert patience.seconds(0.0) == 0.5
    patience.false_alarm(100.0)
    patience.false_alarm(101.0)
    assert patience.seconds(101.0 + 0.99 * CALM_S) == 2.0
    assert patience.seconds(101.0 + CALM_S) == 1.0
    assert patience.seconds(101.0 + 1.5 * CALM_S) == 1.0
    assert patience.seconds(101.0 + 2 * CALM_S) == 0.5
    assert patience.seconds(1e6) == 0.5
    for at in range(20):
        patience.false_alarm(float(at))
    assert patience.seconds(20.0) == 0.5 * LIMIT


def test_one_alarm_after_a_long_calm_counts_once() -> None:
    patience = Patience(1.0)
    for _ in range(3):
        patience.false_alarm(0.0)
    assert patience.seconds(10 * CALM_S) == 1.0
    patience.false_alarm(10 * CALM_S)
    assert patience.seconds(10 * CALM_S + 1) == 2.0
