"""Runs seeds, judges them, and says how to run a failing one again."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.simulate.cluster import SimulatedCluster
from cluster.simulate.faults import FAULTS_END_S, draw, draw_probes
from cluster.simulate.transport import Checks
from cluster.simulate.world import World, lines
from experts.errors import InvalidInput

PATIENCE_S = 100.0
"""After the faults everything must be over within this."""
ECHO_S = 2.0
"""After the last answer: what cancels and reports may still take."""

MAX_SEEDS = 10_000_000
MAX_SHOWN = 8

OURS = ("cluster", "router", "experts")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a seed. `history` are lines to read; `answered` and `failed` count its
    requests."""

    seed: int
    violations: tuple[str, ...]
    history: tuple[str, ...]
    answered: int
    failed: int
    trouble: Counter[str]
    """What routers met with shipments, by the name of the error."""

    @property
    def complaint(self) -> str:
        """What was violated, and the command that shows how."""
        found = [f"  {violation}" for violation in self.violations[:MAX_SHOWN]]
        more = len(self.violations) - len(found)
        return "\n".join(
            [
                f"seed {self.seed} fails:",
                *found,
                *([f"  and {more} more"] if more else []),
                f"  again: herd simulate faults --seeds {self.seed} --verbose",
            ]
        )


def run_seed(seed: int, checks: Checks | None = None) -> Outcome:
    """Run one seed to its end; the same outcome, to the last line of history, every time."""
    world = World(seed)
    drawn = draw(seed)
    cluster = SimulatedCluster(world, drawn, checks)
    with _errors_are(cluster.invariants.violated):
        try:
            _live(cluster, seed)
        except Exception as error:
            cluster.invariants.violated(f"the simulation stops: {error!r}")
        finally:
            cluster.kill_all()
    stories = cluster.invariants.stories.values()
    return Outcome(
        seed=seed,
        violations=tuple(cluster.invariants.violations),
        history=tuple(lines(world.history)),
        answered=sum(story.is_answered for story in stories),
        trouble=sum((Counter(router.experts.stats.failures) for router in cluster.all_routers), Counter()),
        failed=sum(not story.is_answered and not story.left for story in stories),
    )


def _live(cluster: SimulatedCluster, seed: int) -> None:
    world, drawn, invariants = cluster.world, cluster.drawn, cluster.invariants
    world.note("seed", f"{drawn}")
    cluster.start()
    for asked in drawn.requests:
        cluster.expect(asked)
    for fault in drawn.faults:
        cluster.suffer(fault)
    for wished in drawn.wishes:
        cluster.grant(wished)
    world.run(FAULTS_END_S)
    world.note("faults", "are over")
    hosts, routers = cluster.heal(random.Random(f"core {seed}"))
    world.note("core", f"{', '.join((*hosts, *routers))}")
    probes = draw_probes(seed, world.now)
    for probe in probes:
        cluster.expect(probe)
    num_stories = len(drawn.requests) + len(probes)

    def over() -> bool:
        return len(invariants.stories) == num_stories and invariants.all_over() and cluster.has_converged(hosts)

    world.run(world.now + PATIENCE_S, stop=over)
    world.run(world.now + ECHO_S)
    # What was lost for good may have come to be missed only now.
    world.run(world.now + PATIENCE_S, stop=lambda: cluster.has_converged(hosts))
    invariants.judge_end()
    invariants.check(cluster.has_converged(hosts), lambda: f"the placement never lists all that {hosts} hold")
    for name in routers:
        invariants.is_idle(cluster.routers[name])


class _Listener(logging.Handler):
    """Hears of errors that parts catch and log."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.ERROR)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._tell(f"{record.name} logs an error: {record.getMessage()}: {error!r}")


@contextmanager
def _errors_are(tell: Callable[[str], None]) -> Iterator[None]:
    """Call `tell` for every error that is logged, and let no log out."""
    listener = _Listener(tell)
    loggers = [logging.getLogger(name) for name in OURS]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(listener)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(listener)
            logger.propagate = propagate


def parse_seeds(text: str) -> range:
    """ "A-B" with both ends, or "A". Raises InvalidInput."""
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() if dash else True)):
        raise InvalidInput("seeds", text, "must be a number or two of them, as in 0-199")
    seeds = range(int(first), int(last or first) + 1)
    if not seeds or len(seeds) > MAX_SEEDS:
        raise InvalidInput("seeds", text, f"must name between 1 and {MAX_SEEDS} seeds, the smallest first")
    return seeds


def print_runs(seeds: Iterable[int], *, verbose: bool) -> int:
    """Run all of `seeds` and print what fails, and with `verbose` everything; returns how many failed."""
    num_run = num_failed = num_answered = num_refused = 0
    began = time.perf_counter()
    for seed in seeds:
        outcome = run_seed(seed)
        num_run += 1
        num_failed += bool(outcome.violations)
        num_answered += outcome.answered
        num_refused += outcome.failed
        if verbose:
            print("\n".join(outcome.history))
        if outcome.violations:
            print(outcome.complaint, flush=True)
    took_s = time.perf_counter() - began
    print(f"{num_run} seeds, {num_failed} failed, in {took_s:.1f} s: ", end="")
    print(f"{num_answered} requests were answered, {num_refused} ended in errors that faults explain")
    return num_failed
