"""Measures what the failover machine costs a router while all is well: the decisions about one layer's rows."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from cluster.config import ServeSettings
from cluster.control.pack import pack
from cluster.measure.engine import bench_engine
from experts.config import ModelConfig, load_config
from experts.placement import ClusterView, ComputeCost, HostInfo, Placement
from router.failover.core import step
from router.failover.events import Answered, Begin, Effect, Event, Linked, Looked, Send, StepBegun, Tick, Viewed
from router.failover.state import FailoverState

COST = ComputeCost(per_expert_s=3e-4, per_row_s=1e-5)
ANSWER_S = 0.001
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 24


@dataclass(frozen=True, kw_only=True)
class DecisionResult:
    """`per_layer_us`: all calls of the machine for the rows of one layer, `split_us` the first of them, which divides
    the rows among hosts. Medians, microseconds. `of_step_pct`: the calls of all layers in a decode step of `step_ms`,
    which is one of as many rows of that model over so many hosts."""

    experts: int
    hosts: int
    replicas: int
    rows: int
    shipments: int
    per_layer_us: float
    split_us: float
    layers: int
    step_ms: float
    of_step_pct: float


def bench_decisions(settings: ServeSettings, batches: Sequence[int], rounds: int = 2000) -> list[DecisionResult]:
    """Measure dispatches whose answers come one by one, as they do, without rows, network or waiting; and the decode
    steps of `batches` that such dispatches are part of, with all of it. Raises InvalidInput."""
    steps = bench_engine(settings, batches, [PROMPT_TOKENS], OUTPUT_TOKENS)
    config = load_config(settings.model_dir)
    return [
        _bench(settings, config, step.batch * config.experts_per_token, step.step_ms, rounds=rounds) for step in steps
    ]


def _bench(settings: ServeSettings, config: ModelConfig, rows: int, step_ms: float, *, rounds: int) -> DecisionResult:
    experts, layers = config.num_experts, len(config.moe_layers)
    machine = _Machine(experts, settings.hosts, settings.replicas)
    random = Random(rows)
    layer_s, split_s, shipments = [], [], 0
    for number in range(rounds + 200):
        touched = Counter((0, random.randrange(experts)) for _ in range(rows))
        whole, first, shipments = machine.dispatch(number, touched)
        layer_s.append(whole)
        split_s.append(first)
    per_layer_us = sorted(layer_s[200:])[rounds // 2] * 1e6
    return DecisionResult(
        experts=experts,
        hosts=settings.hosts,
        replicas=settings.replicas,
        rows=rows,
        shipments=shipments,
        per_layer_us=round(per_layer_us, 1),
        split_us=round(sorted(split_s[200:])[rounds // 2] * 1e6, 1),
        layers=layers,
        step_ms=step_ms,
        of_step_pct=round(100 * layers * per_layer_us / (step_ms * 1e3), 2),
    )


class _Machine:
    """The machine among hosts that answer one after the other, on a clock of its own."""

    def __init__(self, experts: int, hosts: int, replicas: int) -> None:
        names = [f"host-{number}" for number in range(hosts)]
        table = pack(layers=[0], num_experts=experts, hosts=names, num_replicas=replicas)
        infos = {name: HostInfo(name=name, incarnation=1, address=name, cost=COST) for name in names}
        view = ClusterView(version=1, placement=Placement(epoch=1, replicas=table), hosts=infos)
        self._state = FailoverState()
        self._now = 0.0
        for event in (Viewed(view=view), Linked(hosts=frozenset(names)), StepBegun(give_up_at=float("inf"))):
            self._decide(event)

    def dispatch(self, number: int, rows: dict[tuple[int, int], int]) -> tuple[float, float, int]:
        """Seconds in all calls, seconds in the first that sends, number of shipments."""
        took_s = self._decide(Looked(until=0.0))[0] + self._decide(Tick())[0]
        split_s, effects = self._decide(Begin(dispatch=number, rows=rows))
        took_s += split_s
        sends = [effect for effect in effects if isinstance(effect, Send)]
        for send in sends:
            self._now += ANSWER_S / len(sends)
            for event in (Looked(until=self._now + ANSWER_S), Answered(shipment=send.shipment), Tick()):
                took_s += self._decide(event)[0]
        return took_s, split_s, len(sends)

    def _decide(self, event: Event) -> tuple[float, list[Effect]]:
        began = time.perf_counter()
        self._state, effects = step(self._state, event, self._now)
        return time.perf_counter() - began, effects
