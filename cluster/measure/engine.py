"""Measures the engine without Ray or HTTP: speed of prefill and decode of one router, its experts here or on hosts, the
share of what the machine could do, and where the time goes.

Prompts are random and all different, answers greedy, end tokens ignored. Prefill is timed on requests that want one
token, decode on the same prompts from the moment that all of them have one to that when one has its last.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from cluster.config import ServeSettings
from cluster.local import Model, build_engine, choose_device, load_local_experts, open_model
from cluster.measure.drive import Times, check_room, drive
from cluster.measure.floor import StepShape, floor_s, step_bytes
from cluster.measure.machine import Machine, measure_machine
from cluster.measure.watch import Record, Seen, StopWatch, WatchedExperts, WatchedRunner
from cluster.topology import Role, needs
from experts.errors import InvalidInput
from experts.placement import ExpertKey
from router.engine.engine import Engine
from router.model.decoder import RoutedExperts
from router.stacked_experts import StackedExperts

if TYPE_CHECKING:
    from cluster.measure.hosts import HostProcesses

SEED = 20240
WARM_UP_TOKENS = 4
WATCHED = ("attention", "shared", "experts", "sampling")
SPLIT = ("attention", "shared", "experts", "dispatch", "sampling", "other")


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    """One row of the engine's bench. `step_ms` is the mean decode step. `floor_ratio` is the least time that the same
    decode steps take on a machine that reads and multiplies as fast as this one did a moment before, over the time they
    took; `prefill_floor_ratio` the same of prefill. `split` has the milliseconds of a decode step by part; "dispatch"
    is what rows cost beyond the computation of the slowest host."""

    transport: str
    hosts: int
    batch: int
    prompt: int
    output: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    step_ms: float
    floor_ratio: float
    prefill_floor_ratio: float
    read_gb_per_s: float
    matmul_tflops: float
    split: dict[str, float]


@dataclass
class Bench:
    """An engine that is looked at while it runs."""

    engine: Engine
    model: Model
    settings: ServeSettings
    record: Record
    hosts: HostProcesses | None

    def measure(self, batch: int, prompt: int, output: int, seed: int) -> EngineResult:
        """Speed of `batch` requests of `prompt` tokens that want `output` each. The machine drifts, so it is measured
        before and after whatever is compared with it."""
        like = self.warm_up(batch, prompt, seed - 1)
        prompts = self._prompts(batch, prompt, seed)
        before = self._machine(like)
        self.record.steps.clear()
        prefill_s = drive(self.engine, prompts, 1, self.record.hold).prefill_s
        prefill = [seen.shape() for seen in self.record.steps]
        between = self._machine(like)
        times, decode, host_compute_s = self._decode(prompts, output)
        shapes = [seen.shape() for seen in decode]
        machine = between.mean(self._machine(shapes))
        step_s = times.decode_s * batch / times.num_decoded
        return EngineResult(
            transport=self.settings.transport,
            hosts=self.settings.hosts if self.hosts else 0,
            batch=batch,
            prompt=prompt,
            output=output,
            prefill_tokens_per_s=round(batch * prompt / prefill_s, 1),
            decode_tokens_per_s=round(times.num_decoded / times.decode_s, 1),
            step_ms=round(step_s * 1e3, 2),
            floor_ratio=round(self._floor_s(shapes, machine) / len(shapes) / step_s, 3),
            prefill_floor_ratio=round(self._floor_s(prefill, before.mean(between)) / prefill_s, 3),
            read_gb_per_s=round(machine.read_bytes_per_s / 1e9, 1),
            matmul_tflops=round(machine.flops_per_s / 1e12, 2),
            split=self._split(step_s, decode, host_compute_s),
        )

    def _decode(self, prompts: Sequence[list[int]], output: int) -> tuple[Times, list[Seen], float]:
        """When tokens came, the steps in which everyone decoded, and what the slowest host computed in one of them."""
        self.record.steps.clear()
        before: list[tuple[int, dict[str, float]]] = []
        times = drive(
            self.engine,
            prompts,
            output,
            self.record.hold,
            lambda: before.append((len(self.record.steps), self._host_compute_s())),
        )
        decode = [seen for seen in self.record.steps if seen.is_decode_of(len(prompts))]
        if not decode or not times.num_decoded:
            rule = f"is too short: of {len(prompts)} answers some end before all have begun"
            raise InvalidInput("output", output, rule)
        [(first, computed)] = before
        spent_s = max((s - computed[name] for name, s in self._host_compute_s().items()), default=0.0)
        return times, decode, spent_s / max(1, len(self.record.steps) - first)

    def warm_up(self, batch: int, prompt: int, seed: int) -> list[StepShape]:
        """Once through everything, so that memory is touched and kernels are chosen; gives the last step, a decode."""
        drive(self.engine, self._prompts(batch, prompt, seed), WARM_UP_TOKENS, self.record.hold)
        return [self.record.steps[-1].shape()]

    def _machine(self, decode: Sequence[StepShape]) -> Machine:
        """This machine as all processes together use it, on as many bytes as a decode step reads."""
        threads = needs(self.settings, Role.ROUTER).threads + (len(self.hosts.pipes) if self.hosts else 0)
        itemsize = self.model.dtype.itemsize
        size = sum(step_bytes(self.model.config, itemsize, shape) for shape in decode) / len(decode)
        return measure_machine(
            num_bytes=int(size),
            dtype=self.model.dtype,
            threads=min(threads, os.cpu_count() or 1),
            device=choose_device(self.settings),
        )

    def _floor_s(self, shapes: Sequence[StepShape], machine: Machine) -> float:
        return sum(floor_s(self.model.config, self.model.dtype.itemsize, shape, machine) for shape in shapes)

    def _split(self, step_s: float, decode: Sequence[Seen], host_compute_s: float) -> dict[str, float]:
        """Milliseconds per decode step."""
        seen = {part: sum(one.seconds.get(part, 0.0) for one in decode) / len(decode) for part in WATCHED}
        rows_s = seen.pop("experts")
        seen["experts"] = min(host_compute_s, rows_s) if self.hosts else rows_s
        seen["dispatch"] = rows_s - seen["experts"]
        seen["other"] = step_s - sum(seen.values())
        return {part: round(seen[part] * 1e3, 2) for part in SPLIT}

    def _prompts(self, batch: int, prompt: int, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        prompts: list[list[int]] = torch.randint(
            0, self.model.config.vocab_size, (batch, prompt), generator=generator
        ).tolist()
        return prompts

    def _host_compute_s(self) -> dict[str, float]:
        return self.hosts.compute_s() if self.hosts else {}


def bench_engine(
    settings: ServeSettings,
    batches: Sequence[int],
    prompts: Sequence[int],
    output: int,
    on_result: Callable[[EngineResult], None] = lambda _result: None,
) -> list[EngineResult]:
    """Measure every combination of batch and prompt length on one engine, after one small warm-up each.

    Raises InvalidInput where a combination leaves nothing to measure.
    """
    if output < 2:
        raise InvalidInput("output", output, "must be at least 2: the first token of an answer is no decode")
    # Full batches are measured: those whose prompts are done must not make the others wait.
    settings = replace(settings, max_running=max(settings.max_running, *batches), decode_stretch=math.inf)
    model = open_model(settings.model_dir, settings.dtype)
    torch.set_num_threads(needs(settings, Role.ROUTER).threads)
    results = []
    with bench_of(model, settings) as bench:
        check_room(bench.engine, max(prompts), max(output, WARM_UP_TOKENS))
        for number, (prompt, batch) in enumerate((prompt, batch) for prompt in prompts for batch in batches):
            results.append(bench.measure(batch, prompt, output, SEED + 2 * number + 1))
            on_result(results[-1])
    return results


@contextmanager
def bench_of(model: Model, settings: ServeSettings) -> Iterator[Bench]:
    """A running engine; its host processes end with it."""
    watch, record = StopWatch(), Record()

    def engine_with(
        experts: RoutedExperts,
        available: Callable[[frozenset[ExpertKey]], bool] = lambda _missing: True,
        at_hand: StackedExperts | None = None,
    ) -> Engine:
        return build_engine(
            model,
            settings,
            WatchedExperts(experts, watch, record),
            available,
            at_hand=at_hand,
            meter=watch,
            wrap=lambda runner: WatchedRunner(runner, watch, record, at_hand),
        )

    if settings.transport == "local":
        local = load_local_experts(model, settings)
        with _running(engine_with(local, at_hand=local.stacked)) as engine:
            yield Bench(engine, model, settings, record, None)
        return
    # Only here, so that a bench without hosts needs no gRPC.
    from cluster.measure.hosts import remote_experts

    with remote_experts(model, settings) as (remote, hosts), _running(engine_with(remote, remote.available)) as engine:
        yield Bench(engine, model, settings, record, hosts)


@contextmanager
def _running(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
