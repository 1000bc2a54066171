"""`herd simulate placement`: options in, a table out."""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.control.explain import as_text
from cluster.control.fleet import Fleet, HostSpec
from cluster.control.loop import imbalances
from cluster.control.move_state import Limits
from cluster.control.pack import pack
from cluster.control.plan import Policy
from cluster.result_file import STANDARD_OUTPUT, check_result_file, write_result
from cluster.simulate_placement.loads import Source, TraceLoad, ZipfLoad, ZipfSettings
from cluster.simulate_placement.world import Sight, World
from experts.errors import InvalidInput

MOST_TICKS = 10_000_000
MOST_REPLICAS = 1_000_000
TICK_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """Some ticks together. Imbalances (slowest host over mean) are means over time, of all layers and of the worst;
    `unmoved` is what the first placement would have now. `waiting` and `unserved` are percentages."""

    seconds: float
    imbalance: float
    worst: float
    unmoved: float
    waiting: float
    unserved: float
    loads: int
    moved_mb: float
    plans: int
    epoch: int


def run_placement(options: argparse.Namespace) -> int:
    """Simulate and print. Raises InvalidInput."""
    check_result_file(options.json)
    _check(options)
    source, keys, seconds = _source(options)
    world = _world(options, source, keys)
    rows = _simulate(world, min(seconds, MOST_TICKS * TICK_S), options)
    history = [asdict(applied) for applied in world.state.history]
    document = json.dumps({"results": [asdict(row) for row in rows], "plans": history}, indent=1)
    if options.json == STANDARD_OUTPUT:
        print(document)
        return 0
    if options.json is not None:
        write_result(options.json, document)
    _print(rows)
    return 0


def _check(options: argparse.Namespace) -> None:
    bounds = {
        "hosts": (1, 10_000),
        "nodes": (1, 10_000),
        "replicas": (1.0, 10_000.0),
        "layers": (1, 1_000),
        "experts": (1, 10_000),
        "rows": (0.0, 1e9),
        "drift": (0.0, 10.0),
        "shift": (0.0, 1e9),
        "seconds": (TICK_S, MOST_TICKS * TICK_S),
        "every": (TICK_S, 1e9),
        "expert_bytes": (1, 10**12),
        "bytes_per_s": (1.0, 1e15),
    }
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise InvalidInput(name.replace("_", "-"), value, f"must be between {least} and {most}")


def _source(options: argparse.Namespace) -> tuple[Source, list[tuple[int, int]], float]:
    kind, _, exponent = options.trace.partition(":")
    if kind != "zipf":
        trace = TraceLoad(Path(options.trace))
        if trace.seconds < TICK_S:
            raise InvalidInput("trace", options.trace, f"must be of at least {TICK_S:g} seconds, a turn of the loop")
        return trace, sorted(trace.keys), options.seconds or trace.seconds
    try:
        power = float(exponent)
    except ValueError:
        power = math.nan
    if not 0.0 <= power <= 10.0:
        raise InvalidInput("trace", options.trace, "must be zipf:EXPONENT with a number from 0 to 10, or a file")
    settings = ZipfSettings(
        exponent=power,
        layers=options.layers,
        experts=options.experts,
        rows_per_s=options.rows,
        drift=options.drift,
        shift_s=options.shift,
    )
    keys = [(layer, expert) for layer in range(options.layers) for expert in range(options.experts)]
    return ZipfLoad(settings, random.Random(options.seed)), keys, options.seconds or 3600.0


def _world(options: argparse.Namespace, source: Source, keys: list[tuple[int, int]]) -> World:
    slots = math.ceil(options.replicas * len(keys) / options.hosts)
    if slots * options.hosts > MOST_REPLICAS:
        raise InvalidInput("replicas", options.replicas, f"must leave at most {MOST_REPLICAS} replicas in all")
    hosts = [
        HostSpec(name=f"host-{host}", slots=slots, node=f"node-{host % options.nodes}") for host in range(options.hosts)
    ]
    names = [host.name for host in hosts]
    packed = pack(
        layers=sorted({layer for layer, _ in keys}),
        num_experts=1 + max(expert for _, expert in keys),
        hosts=names,
        num_replicas=1,
    )
    return World(
        source=source,
        fleet=Fleet.of(hosts, options.expert_bytes),
        policy=Policy(bytes_per_s=options.bytes_per_s),
        limits=Limits(bytes_per_s=options.bytes_per_s),
        rng=random.Random(options.seed + 1),
        start={key: packed[key] for key in keys},
        tick_s=TICK_S,
    )


def _simulate(world: World, seconds: float, options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    pending: list[Sight] = []
    while world.now + TICK_S <= seconds + 1e-9:
        sight = world.tick()
        if sight is None:
            break
        pending.append(sight)
        if options.explain and options.json != STANDARD_OUTPUT and sight.plan is not None and sight.plan.is_change:
            print(f"{sight.at:.0f} s: {as_text(sight.plan)}")
        if len(pending) * TICK_S >= options.every:
            rows.append(_row(pending, world))
            pending = []
    return [*rows, _row(pending, world)] if pending else rows


def _row(sights: list[Sight], world: World) -> Row:
    layers = [value for sight in sights for value in sight.imbalance.values()]
    unmoved = imbalances(sights[-1].load, world.fleet, world.start).values()
    return Row(
        seconds=sights[-1].at,
        imbalance=round(sum(layers) / len(layers), 3),
        worst=round(sum(max(sight.imbalance.values()) for sight in sights) / len(sights), 3),
        unmoved=round(sum(unmoved) / len(unmoved), 3),
        waiting=round(100.0 * sum(sight.waiting for sight in sights) / len(sights), 2),
        unserved=round(100.0 * sum(sight.unserved for sight in sights) / len(sights), 3),
        loads=sum(sight.loads for sight in sights),
        moved_mb=round(sum(sight.loaded_bytes for sight in sights) / 1e6, 1),
        plans=sum(sight.plan is not None and sight.plan.is_change for sight in sights),
        epoch=sights[-1].epoch,
    )


def _print(rows: list[Row]) -> None:
    table = [[str(value) for value in asdict(row).values()] for row in rows]
    heads = list(asdict(rows[0]))
    widths = [max(len(line[column]) for line in (heads, *table)) for column in range(len(heads))]
    for line in (heads, *table):
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
    moved = sum(row.moved_mb for row in rows)
    print(f"{sum(row.plans for row in rows)} plans, {sum(row.loads for row in rows)} loads, {moved:.1f} MB")
