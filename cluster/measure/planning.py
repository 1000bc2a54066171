"""How long plans take, and how many hours of the control loop a minute of processor time simulates."""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass

from cluster.control.fleet import Fleet, HostSpec, Load
from cluster.control.move_state import Limits
from cluster.control.pack import pack
from cluster.control.plan import PlanState, Policy, plan
from cluster.control.replicas import Replicas
from cluster.simulate_placement.loads import ZipfLoad, ZipfSettings
from cluster.simulate_placement.world import World

SHAPES = ((16, 48, 32, 1536), (128, 24, 256, 6144), (16, 4, 4, 80))
"""Experts, layers, hosts, slots of all hosts."""


@dataclass(frozen=True, kw_only=True)
class PlanTime:
    """Milliseconds of processor time for a first plan, for one after a drift of 10 % and for one after all popularities
    were dealt anew; how many replicas these two load, and the mean imbalance of the layers after the last."""

    experts: int
    layers: int
    hosts: int
    slots: int
    first_ms: float
    drifted_ms: float
    dealt_ms: float
    drifted_loads: int
    dealt_loads: int
    imbalance: float


@dataclass(frozen=True, kw_only=True)
class LoopSpeed:
    """Ticks of 5 s, 4 hosts, 16 experts in each of 4 layers."""

    drift: float
    shift_s: float
    simulated_h: float
    hours_per_cpu_minute: float


def bench_plans() -> list[PlanTime]:
    return [_plan_time(*shape) for shape in SHAPES]


def bench_loop_speed(hours: float = 2.0) -> list[LoopSpeed]:
    return [_loop_speed(drift, shift_s, hours) for drift, shift_s in ((0.0, 0.0), (0.05, 0.0), (0.02, 600.0))]


def _plan_time(num_experts: int, num_layers: int, num_hosts: int, slots: int) -> PlanTime:
    rng = random.Random(0)
    settings = ZipfSettings(exponent=1.0, layers=num_layers, experts=num_experts, rows_per_s=1e5)
    fleet = Fleet.of([HostSpec(name=f"host-{host}", slots=slots // num_hosts) for host in range(num_hosts)])
    placement: Replicas = {(layer, expert): () for layer in range(num_layers) for expert in range(num_experts)}
    state, policy = PlanState(), Policy(settle_s=0.0)
    first = ZipfLoad(settings, rng).step(1.0)
    drifted = {key: rate * max(0.0, 1.0 + rng.gauss(0.0, 0.1)) for key, rate in first.items()}
    taken, loads, imbalance = [], [], 1.0
    for turn, rows in enumerate((first, drifted, ZipfLoad(settings, rng).step(1.0))):
        now = 1000.0 * turn
        # A collection of everything else that this process has is not part of a plan.
        gc.collect()
        began = time.process_time()
        made, state = plan(Load(at=now, rows=rows), fleet, placement, policy, state, now)
        taken.append(1e3 * (time.process_time() - began))
        loads.append(len(made.loads))
        placement = made.target
        imbalance = sum(note.after for note in made.layers) / max(1, len(made.layers))
    return PlanTime(
        experts=num_experts,
        layers=num_layers,
        hosts=num_hosts,
        slots=slots,
        first_ms=round(taken[0], 1),
        drifted_ms=round(taken[1], 1),
        dealt_ms=round(taken[2], 1),
        drifted_loads=loads[1],
        dealt_loads=loads[2],
        imbalance=round(imbalance, 3),
    )


def _loop_speed(drift: float, shift_s: float, hours: float) -> LoopSpeed:
    hosts = [HostSpec(name=f"host-{host}", slots=20) for host in range(4)]
    settings = ZipfSettings(exponent=1.0, layers=4, experts=16, rows_per_s=2000.0, drift=drift, shift_s=shift_s)
    world = World(
        source=ZipfLoad(settings, random.Random(1)),
        fleet=Fleet.of(hosts),
        policy=Policy(),
        limits=Limits(),
        rng=random.Random(2),
        start=pack(layers=range(4), num_experts=16, hosts=[host.name for host in hosts], num_replicas=1),
    )
    began = time.process_time()
    for _ in range(round(hours * 3600.0 / world.tick_s)):
        world.tick()
    taken = time.process_time() - began
    return LoopSpeed(
        drift=drift, shift_s=shift_s, simulated_h=hours, hours_per_cpu_minute=round(60.0 * hours / taken, 1)
    )
