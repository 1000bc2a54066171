"""Runs drills against a cluster of this machine: load up, fault, watch, mend, verdict; one drill after the other."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.drill.faults import Injection, Kind, check_is_here, inject
from cluster.drill.load import Load, bodies
from cluster.drill.notice import noticed_in, pages_of
from cluster.drill.verdict import Fault, Verdict, judge
from cluster.load.client import Client
from cluster.load.settings import LoadSettings
from experts.errors import ControllerUnreachable, HerdError, InvalidInput
from experts.reports import ClusterStatus

CALM_S = 4.0
"""Of load before a fault, to know what is usual; a moment drawn from as much again is added."""
AFTER_S = 10.0
HEAL_S = 90.0
NOTICE_S = 0.5
"""Routers keep when a host last became what it is: soon after a blow that is because of the blow."""
LOOK_S = 0.25
PROMPT_TOKENS = 24


class DrillFailed(HerdError):
    """A drill could not be carried out, so that nothing can be said."""


@dataclass(frozen=True, kw_only=True)
class DrillSettings:
    """`streams` requests of `output` tokens at a time; `times` faults per drill at moments drawn by `seed`."""

    url: str
    model: str
    streams: int = 16
    output: int = 64
    times: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("streams", "output", "times"):
            if not 1 <= getattr(self, name) <= 4096:
                raise InvalidInput(name, getattr(self, name), "must be between 1 and 4096")


@dataclass(frozen=True, kw_only=True)
class Drill:
    """`ask` gives the cluster's status, `cut` takes a host's rows off the network for some seconds. Prompts are made of
    `token_ids`."""

    settings: DrillSettings
    token_ids: Sequence[int]
    ask: Callable[[], ClusterStatus]
    cut: Callable[[str, float], None]

    async def run(self, kinds: Sequence[Kind], on_verdict: Callable[[Verdict], None]) -> list[Verdict]:
        """All of `kinds` in turn. Raises DrillFailed, InvalidInput and ControllerUnreachable."""
        check_is_here(self.ask())
        verdicts = []
        async with Client(LoadSettings(url=self.settings.url)) as client:
            expected: dict[int, str] = {}
            for kind in kinds:
                load = Load(client, self._bodies(), expected)
                if not expected:
                    await self._learn(load)
                verdicts.append(await self._run_one(kind, load))
                on_verdict(verdicts[-1])
        return verdicts

    async def _learn(self, load: Load) -> None:
        try:
            await load.learn()
        except ValueError as error:
            raise DrillFailed(f"the cluster does not answer without any fault: {error}") from None

    async def _run_one(self, kind: Kind, load: Load) -> Verdict:
        draw = random.Random(f"{self.settings.seed} {kind}")
        running = asyncio.create_task(load.run())
        began, faults = time.perf_counter(), []
        try:
            for _ in range(self.settings.times):
                await asyncio.sleep(CALM_S * (1 + draw.random()))
                faults.append(await self._fault(kind, draw))
        finally:
            load.end()
            await running
        return judge(kind, load.told, faults, began, len(self.ask().hosts))

    async def _fault(self, kind: Kind, draw: random.Random) -> Fault:
        """One fault, from the blow until the cluster is whole again."""
        before = await asyncio.to_thread(self.ask)
        injection, at, wall = await asyncio.to_thread(self._strike, kind, before, draw)
        try:
            await asyncio.sleep(NOTICE_S)
            early = await asyncio.to_thread(pages_of, before)
            await asyncio.sleep(max(0.0, at + injection.lasts_s - time.perf_counter()))
        finally:
            await asyncio.to_thread(injection.undo)
        undone = time.perf_counter()
        await asyncio.sleep(max(0.0, at + AFTER_S - undone))
        late = await asyncio.to_thread(pages_of, before)
        pages = [first + last for first, last in zip(early, late, strict=True)]
        await self._healed(before)
        return Fault(
            kind=kind,
            victims=injection.victims,
            at=at,
            undone=undone,
            end=time.perf_counter(),
            noticed={
                name: None if when is None else at + when - wall
                for name, when in ((name, noticed_in(pages, name, wall)) for name in injection.hosts)
            },
        )

    def _strike(self, kind: Kind, status: ClusterStatus, draw: random.Random) -> tuple[Injection, float, float]:
        """Also when: an instant before, on the clocks of streams and of routers."""
        at, wall = time.perf_counter(), time.time()
        return inject(kind, status, self.cut, draw), at, wall

    async def _healed(self, before: ClusterStatus) -> None:
        """Wait until all parts are there again."""
        end = time.perf_counter() + HEAL_S
        while time.perf_counter() < end:
            if await asyncio.to_thread(self._is_whole, before):
                return
            await asyncio.sleep(LOOK_S)
        raise DrillFailed(f"the cluster was not whole again {HEAL_S:.0f} s after the fault")

    def _is_whole(self, before: ClusterStatus) -> bool:
        try:
            now = self.ask()
        except ControllerUnreachable:
            return False
        ready = sum(router.state == "ready" for router in now.routers)
        return (
            now.replicas_held == now.replicas_wanted
            and ready >= len(before.routers)
            and len(now.ingresses) >= len(before.ingresses)
            and not now.problems
        )

    def _bodies(self) -> list[bytes]:
        draw = random.Random(self.settings.seed)
        prompts = [draw.choices(self.token_ids, k=PROMPT_TOKENS) for _ in range(self.settings.streams)]
        return bodies(self.settings.model, prompts, self.settings.output)
