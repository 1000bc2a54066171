"""The expert host: slots, whole answers, counters, and what may go on beside a computation."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from expert_hosts import EXPERT_SIZE, HIDDEN, PATIENCE_S, Experts, assert_answers, make_shipment

from experts.errors import CheckpointError, HostFailed, NotHosted
from experts.ffn import ExpertWeights
from experts.host import ExpertHost
from experts.load import LoadWindow
from experts.transport.base import Segment

FIRST, SECOND, THIRD = (1, 0), (1, 1), (3, 0)


class SlowExperts(Experts):
    """Loads wait for `gate`; `entered` tells that one began."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.gate = threading.Event()

    def load(self, layer: int, expert: int) -> ExpertWeights:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        return super().load(layer, expert)


class MissingExperts:
    def load(self, layer: int, expert: int) -> ExpertWeights:
        raise CheckpointError(f"expert {expert} of layer {layer}", "the tensor is missing")


def test_load_and_evict_change_what_is_held() -> None:
    host = ExpertHost("a", Experts())
    assert host.held() == frozenset()
    for key in (FIRST, SECOND, FIRST):
        host.load(key)
    assert host.held() == {FIRST, SECOND}
    host.evict(FIRST)
    host.evict(THIRD)
    assert host.held() == {SECOND}


def test_a_failed_load_takes_no_slot() -> None:
    host = ExpertHost("a", MissingExperts())
    with pytest.raises(CheckpointError, match="expert 0 of layer 1"):
        host.load(FIRST)
    assert host.held() == frozenset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_each_segment_with_its_expert(dtype: torch.dtype) -> None:
    host = ExpertHost("a", Experts(dtype))
    for key in (FIRST, SECOND, THIRD):
        host.load(key)
    shipment = make_shipment({SECOND: 3, THIRD: 1, FIRST: 2}, dtype)
    before = shipment.rows_TH.clone()
    assert_answers(shipment, host.compute(shipment))
    assert torch.equal(before, shipment.rows_TH)


def test_missing_experts_are_all_named_and_nothing_is_computed() -> None:
    host = ExpertHost("a", Experts())
    host.load(FIRST)
    with pytest.raises(NotHosted) as caught:
        host.compute(make_shipment({FIRST: 1, SECOND: 2, THIRD: 1}))
    assert caught.value.missing == {SECOND, THIRD}
    assert caught.value.host == "a"
    assert host.rows_total == 0


def test_counts_what_it_computed() -> None:
    host = ExpertHost("a", Experts())
    host.load(FIRST)
    host.load(SECOND)
    host.compute(make_shipment({FIRST: 2, SECOND: 3}))
    host.compute(make_shipment({SECOND: 4}))
    snapshot = host.load_snapshot()
    assert dict(snapshot.rows) == {FIRST: 2, SECOND: 7}
    assert (snapshot.rows_total, snapshot.num_shipments, host.rows_total) == (9, 2, 9)
    assert snapshot.compute_s > 0


def test_a_failed_computation_names_no_details_and_is_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    class WrongShape:
        def load(self, layer: int, expert: int) -> ExpertWeights:
            wrong = HIDDEN + 1
            return ExpertWeights(
                gate_up_FH=torch.zeros(2 * EXPERT_SIZE, wrong), down_HF=torch.zeros(wrong, EXPERT_SIZE)
            )

    host = ExpertHost("a", WrongShape())
    host.load(FIRST)
    with caplog.at_level(logging.ERROR), pytest.raises(HostFailed) as caught:
        host.compute(make_shipment({FIRST: 2}))
    assert str(caught.value) == "host a: the computation failed; see the host's log"
    assert "shapes cannot be multiplied" in caplog.text
    assert host.rows_total == 0


def test_a_load_under_way_holds_up_nothing() -> None:
    source = SlowExperts()
    host = ExpertHost("a", source)
    source.gate.set()
    host.load(FIRST)
    source.gate.clear()
    source.entered.clear()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(host.load, SECOND)
        assert source.entered.wait(PATIENCE_S)
        shipment = make_shipment({FIRST: 2})
        assert_answers(shipment, host.compute(shipment))
        assert host.held() == {FIRST}
        source.gate.set()
        loading.result(PATIENCE_S)
    assert host.held() == {FIRST, SECOND}


def test_computations_run_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = 0, 0
    rest = threading.Event()
    from experts import arithmetic as module

    real = module.expert_ffn

    def watched(weights: ExpertWeights, x_TH: torch.Tensor) -> torch.Tensor:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        rest.wait(0.005)
        inside -= 1
        return real(weights, x_TH)

    monkeypatch.setattr(module, "expert_ffn", watched)
    host = ExpertHost("a", Experts())
    host.load(FIRST)
    shipments = [make_shipment({FIRST: 2}, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for shipment, result in zip(shipments, pool.map(host.compute, shipments), strict=True):
            assert_answers(shipment, result)
    assert most == 1
    assert host.rows_total == 16


def test_the_load_window_counts_from_many_threads() -> None:
    window = LoadWindow()
    segments = (Segment(layer=1, expert=0, num_rows=2), Segment(layer=1, expert=1, num_rows=1))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(200):
            pool.submit(window.record, segments, 0.25, 0.5)
    snapshot = window.snapshot()
    assert dict(snapshot.rows) == {(1, 0): 400, (1, 1): 200}
    assert (snapshot.num_shipments, snapshot.compute_s, snapshot.queue_s) == (200, 50.0, 100.0)
    window.record(segments, 1.0)
    assert snapshot.rows_total == 600
