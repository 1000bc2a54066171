"""The simulated cluster: no seed fails, a seed has one history, and what is broken on purpose is found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from unittest import mock

import pytest

from cluster.cli import main
from cluster.control.core import start
from cluster.control.state import ControllerState, Effect, Journal, Steering, Timing
from cluster.simulate.faults import FAULTS_END_S, Kind, draw
from cluster.simulate.run import Outcome, parse_seeds, run_seed
from cluster.simulate.transport import Checks
from experts.errors import InvalidInput
from router.dispatch import RemotePending
from router.engine.request import Event
from router.engine.scheduler import Scheduler

NUM_SEEDS, SEEDS_AT_A_TIME = 200, 10
ENOUGH_SEEDS = 60
"""Among so many there is one that finds each of the mistakes below."""

TROUBLE: Counter[str] = Counter()


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=[pytest.mark.soak] if first >= NUM_SEEDS // 2 else [])
        for first in range(0, NUM_SEEDS, SEEDS_AT_A_TIME)
    ],
)
def test_no_seed_fails(first: int) -> None:
    for seed in range(first, first + SEEDS_AT_A_TIME):
        outcome = run_seed(seed)
        TROUBLE.update(outcome.trouble)
        assert not outcome.violations, outcome.complaint
        assert outcome.answered >= 3, "the requests after the faults at least"


def test_seeds_meet_every_trouble_that_a_shipment_can_have() -> None:
    """Else the test above says little. (A host that lacks an expert comes with placements that change.)"""
    trouble = TROUBLE or sum((run_seed(seed).trouble for seed in range(ENOUGH_SEEDS)), Counter())
    assert {"HostLost", "DeadlinePassed", "HostFailed", "BadFrame"} <= set(trouble), trouble


def test_seeds_draw_every_fault_and_every_shape() -> None:
    drawn = [draw(seed) for seed in range(NUM_SEEDS)]
    assert {fault.kind for one in drawn for fault in one.faults} == set(Kind)
    assert {one.num_replicas for one in drawn} == {1, 2, 3}
    assert {len(one.routers) for one in drawn} == {1, 2, 3}
    assert {one.model.per_token for one in drawn} == {1, 2}
    switches = [(one.same_address, one.rough_rows, one.rough_tokens) for one in drawn]
    assert all(set(switch) == {True, False} for switch in zip(*switches, strict=True))
    assert all(fault.at + fault.lasts_s <= FAULTS_END_S for one in drawn for fault in one.faults)


def test_a_seed_has_one_history() -> None:
    first, second = run_seed(11), run_seed(11)
    assert first == second
    assert len(first.history) > 100
    assert run_seed(12).history != first.history


def test_a_history_does_not_depend_on_the_process() -> None:
    """Sets of names are in another order for every hash seed."""

    def history(hash_seed: str) -> list[str]:
        command = [sys.executable, "-m", "cluster", "simulate", "faults", "--seeds", "20-22", "--verbose"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        *lines, last = done.stdout.splitlines()
        assert last.startswith("3 seeds, 0 failed")
        return lines

    assert history("1") == history("2")


# What is broken on purpose


def _ignore_lost_rows(self: RemotePending) -> dict[int, tuple[tuple[int, int], ...]]:
    return {}


def _forget_epoch(
    journal: Journal, hosts: Iterable[str], now: float, timing: Timing | None = None, steering: Steering | None = None
) -> tuple[ControllerState, list[Effect]]:
    return start(replace(journal, epoch=0), hosts, now, timing, steering)


def _forget_that_it_waits(
    journal: Journal, hosts: Iterable[str], now: float, timing: Timing | None = None, steering: Steering | None = None
) -> tuple[ControllerState, list[Effect]]:
    state, effects = start(journal, hosts, now, timing, steering)
    return replace(state, hold_until=now), effects


_expire = Scheduler.expire


def _expire_in_silence(self: Scheduler, now: float) -> list[Event]:
    return [event for event in _expire(self, now) if getattr(event, "code", "") != "expert_unavailable"]


def _never_unpark(self: Scheduler, available: Callable[[frozenset[tuple[int, int]]], bool]) -> int:
    return 0


CONTROLLER_START = "cluster.simulate.control.start"


@pytest.mark.parametrize(
    ("broken", "checks", "words"),
    [
        (mock.patch.object(RemotePending, "_lost_rows", _ignore_lost_rows), Checks(), " as token "),
        (mock.patch(CONTROLLER_START, _forget_epoch), Checks(), "epoch 0 names two placements"),
        (mock.patch(CONTROLLER_START, _forget_that_it_waits), Checks(), "which may still hold it"),
        (mock.patch.object(Scheduler, "expire", _expire_in_silence), Checks(), "never ended"),
        (mock.patch.object(Scheduler, "unpark", _never_unpark), Checks(), "is not answered"),
        (nullcontext(), Checks(checksum=False), " as token "),
    ],
    ids=["lost rows", "epoch", "hold", "terminal event", "liveness", "checksum"],
)
def test_a_mistake_is_found(broken: AbstractContextManager[object], checks: Checks, words: str) -> None:
    with broken:
        for seed in range(ENOUGH_SEEDS):
            outcome = run_seed(seed, checks)
            if outcome.violations:
                break
    assert any(words in violation for violation in outcome.violations), outcome.violations
    assert f"herd simulate faults --seeds {seed} --verbose" in outcome.complaint


# The command


def _outcome(seed: int, *violations: str) -> Outcome:
    return Outcome(
        seed=seed, violations=violations, history=(f"history of {seed}",), answered=5, failed=1, trouble=Counter()
    )


def test_the_command_says_which_seed_failed_and_how_to_see_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cluster.simulate.run.run_seed", lambda seed: _outcome(seed, *(["a token is wrong"] if seed == 4 else []))
    )
    assert main(["simulate", "faults", "--seeds", "3-5"]) == 1
    shown = capsys.readouterr().out
    assert "seed 4 fails:\n  a token is wrong\n  again: herd simulate faults --seeds 4 --verbose\n" in shown
    assert "3 seeds, 1 failed" in shown and "15 requests were answered, 3 ended in errors" in shown
    assert "history" not in shown
    assert main(["simulate", "faults", "--seeds", "5", "--verbose"]) == 0
    assert "history of 5" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "a", "5-", "-5", "7-3", "0-99999999", "1-2-3", "1.5"])
def test_seeds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="seeds"):
        parse_seeds(text)


def test_seeds_have_both_ends() -> None:
    assert (parse_seeds("3-5"), parse_seeds("7")) == (range(3, 6), range(7, 8))
