"""The simulated cluster: its parts put together, kept alive as Ray would, and put at a seed's mercy."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from cluster.control.fleet import Load
from cluster.control.move_state import Limits
from cluster.control.pack import pack
from cluster.control.plan import Policy
from cluster.control.state import Asked as ByPersons
from cluster.control.state import (
    HostDrainAsked,
    HostsAsked,
    Journal,
    MoveAsked,
    PlanAsked,
    RollbackAsked,
    Steering,
    Timing,
)
from cluster.simulate.control import Controller, Disk
from cluster.simulate.faults import CONTROLLER, INGRESS, Asked, Drawn, Fault, Kind, Wish, Wished
from cluster.simulate.host import Health, SimulatedHost
from cluster.simulate.ingress import Client, SimulatedIngress
from cluster.simulate.invariants import Invariants
from cluster.simulate.model import LAYERS
from cluster.simulate.network import Network
from cluster.simulate.process import Process
from cluster.simulate.router import SimulatedRouter
from cluster.simulate.transport import Checks
from cluster.simulate.world import World
from experts.errors import HerdError, HostLost, Overloaded
from experts.host import ExpertHost
from router.engine.request import FinishEvent, SamplingParams

SLOW = 100.0
ENSURE_S = 0.3
"""How long it takes to start a process that is asked for."""


class SimulatedCluster:
    """All processes by name, each in its present life. `checks`: what wires check."""

    def __init__(self, world: World, drawn: Drawn, checks: Checks | None = None) -> None:
        self.world = world
        self.drawn = drawn
        self.invariants = Invariants(world, drawn.model, len(drawn.hosts))
        self.network = Network(world=world, weather=drawn.calm)
        self.processes: dict[str, Process] = {}
        self.hosts: dict[str, SimulatedHost] = {}
        self.routers: dict[str, SimulatedRouter] = {}
        self.all_routers: list[SimulatedRouter] = []
        self.controller: Controller
        self.ingress: SimulatedIngress
        self.lost: set[str] = set()
        """Names that nobody starts again."""
        self._checks = checks or Checks()
        self._health = {name: Health() for name in drawn.hosts}
        self._lives: dict[str, int] = {}
        target = pack(
            layers=LAYERS,
            num_experts=drawn.model.num_experts,
            hosts=drawn.hosts,
            num_replicas=drawn.num_replicas,
        )
        self._steering = Steering(
            num_replicas=drawn.num_replicas,
            extra_slots=drawn.extra_slots,
            policy=Policy(min_replicas=drawn.num_replicas),
            limits=Limits(min_replicas=drawn.num_replicas),
        )
        self._disk = Disk(Journal(digest="simulated", target=target))

    def start(self) -> None:
        self._start_controller()
        for name in self.drawn.routers:
            self._start_router(name)
        self._start_ingress()

    def kill_all(self) -> None:
        """The end of the simulation; threads end with their processes."""
        self.lost |= set(self.processes)
        for process in list(self.processes.values()):
            process.kill()

    # Processes begin

    def _begin(self, name: str, again: Callable[[], None]) -> Process:
        """A new life of `name`, after whose end `again` begins the next."""
        life = self._lives[name] = self._lives.get(name, 0) + 1
        process = self.processes[name] = Process(self.world, name, life)
        process.note("begins")
        process.at_death.append(lambda: self.world.after(self.drawn.restart_s, partial(self._revive, process, again)))
        return process

    def _revive(self, process: Process, again: Callable[[], None]) -> None:
        if process.name not in self.lost and self.processes[process.name] is process:
            again()

    def _start_controller(self) -> None:
        process = self._begin(CONTROLLER, self._start_controller)
        self.invariants.controller_since = self.world.now
        self.controller = Controller(
            self.network,
            process,
            self._disk,
            self.drawn.hosts,
            Timing(rehome=self.drawn.rehome_s),
            self._steering,
            self._ensure_host,
            self._end_host,
            self.invariants.publishes,
        )

    def _ensure_host(self, name: str) -> None:
        def start() -> None:
            process = self.processes.get(name)
            if name not in self.lost and (process is None or not process.alive):
                self._start_host(name)

        self.world.after(ENSURE_S, start)

    def _end_host(self, name: str) -> None:
        process = self.processes.get(name)
        if process is not None:
            process.kill()

    def _start_host(self, name: str) -> None:
        process = self.processes.get(name)
        if (process is not None and process.alive) or self._was_drained(name):
            return
        process = self._begin(name, partial(self._start_host, name))
        self.hosts[name] = SimulatedHost(
            self.network,
            process,
            address=name if self.drawn.same_address else f"{name}#{process.life}",
            incarnation=process.life,
            load_s=self.drawn.load_s,
            health=self._health.setdefault(name, Health()),
            peer=self._slots_of,
        )

    def _slots_of(self, name: str) -> ExpertHost:
        process = self.processes[name]
        if not process.alive or process.stopped:
            raise HostLost(name, "does not answer")
        return self.hosts[name].host

    def _start_router(self, name: str) -> None:
        process = self._begin(name, partial(self._start_router, name))
        router = SimulatedRouter(
            self.network,
            process,
            model=self.drawn.model,
            name=f"{name}#{process.life}",
            rough=self.drawn.rough_rows,
            on_view=partial(self.invariants.sees, f"{name}#{process.life}"),
            listener=self.invariants.attempts_on(f"{name}#{process.life}", lambda: router.is_leaving),
            checks=self._checks,
        )
        self.routers[name] = router
        self.all_routers.append(router)
        self.invariants.watch(router)

    def _start_ingress(self) -> None:
        process = self._begin(INGRESS, self._start_ingress)
        self.ingress = SimulatedIngress(
            self.network, process, rough=self.drawn.rough_tokens, on_view=partial(self.invariants.sees, INGRESS)
        )

    def _was_drained(self, name: str) -> bool:
        """Who is told to leave is not started again."""
        journal = self._disk.read()
        if name not in self._host_names():
            return True
        left = journal.moves is not None and any(
            name in names for names in (*journal.moves.goal.values(), *journal.moves.published.values())
        )
        return name in journal.draining and not left

    def _host_names(self) -> tuple[str, ...]:
        """Those of the start, and those that were added and have not left."""
        return (*self.drawn.hosts, *self._disk.read().added)

    # Persons

    def grant(self, wished: Wished) -> None:
        """Let a person ask when the time has come, if the controller is there."""
        self.world.at(wished.at, partial(self._wish, wished))

    def _wish(self, wished: Wished) -> None:
        process = self.processes[CONTROLLER]
        self.world.note("person", f"wishes {wished.wish}")
        process.run(lambda: self.controller.ask(self._asked(wished)))

    def _asked(self, wished: Wished) -> ByPersons:
        rng, state = random.Random(wished.seed), self.controller.state
        keys = sorted(state.moving.goal)
        match wished.wish:
            case Wish.MOVE:
                return MoveAsked(key=rng.choice(keys), to=rng.choice(self._host_names()))
            case Wish.PLAN:
                rows = {key: 1000.0 * rng.paretovariate(1.0) for key in keys}
                return PlanAsked(load=Load(at=self.world.now, rows=rows))
            case Wish.ROLLBACK:
                return RollbackAsked(epoch=rng.choice((None, None, rng.randint(0, 9))))
            case Wish.DRAIN:
                return HostDrainAsked(name=rng.choice(self._host_names()))
            case Wish.HOSTS:
                return HostsAsked(number=rng.randint(1, 6))

    # Clients

    def expect(self, asked: Asked) -> None:
        """Let a client ask when its time has come."""
        self.world.at(asked.at, partial(self._ask, asked))

    def _ask(self, asked: Asked) -> None:
        self.world.note("client", f"{asked.request_id}: asks")
        story = self.invariants.asks(asked)

        def finish(end: FinishEvent | HerdError) -> None:
            if isinstance(end, Overloaded) and asked.is_probe:
                # As clients do: when it is told to, it asks again.
                self.invariants.stories.pop(asked.request_id)
                self.expect(replace(asked, request_id=f"{asked.request_id}+", at=self.world.now + end.retry_after_s))
            else:
                self.invariants.hears_end(story, end)

        client = Client(on_token=partial(self.invariants.hears_token, story), on_finish=finish)
        sampling = SamplingParams(temperature=0.0, seed=asked.seed, max_tokens=asked.max_tokens)
        deadline = self.world.now + asked.timeout_s
        self.ingress.submit(asked.request_id, asked.prompt_ids, sampling, deadline, client)

        def leave() -> None:
            if not story.is_over:
                self.world.note("client", f"{asked.request_id}: leaves")
                story.left = True
                self.ingress.leave(asked.request_id)

        if asked.patience_s is not None:
            self.world.after(asked.patience_s, leave)

    # Faults

    def suffer(self, fault: Fault) -> None:
        """Let a fault happen when its time has come, and end when it is over."""
        self.world.at(fault.at, partial(self._befall, fault))

    def _befall(self, fault: Fault) -> None:
        self.world.note("fault", str(fault))
        self.befall(fault.kind, fault.subject, fault.other)
        self.world.after(fault.lasts_s, partial(self._lift, fault))

    def befall(self, kind: Kind, subject: str, other: str = "") -> None:
        """A fault begins now."""
        process = self.processes.get(subject)
        if kind is Kind.KILL and process is not None:
            process.kill()
        elif kind is Kind.STOP and process is not None:
            process.stop()
        elif kind is Kind.RETIRE and process is not None:
            process.run(self.routers[subject].leave)
        elif kind is Kind.SLOW:
            self._health[subject].slowness = SLOW
        elif kind is Kind.SICK:
            self._health[subject].is_sick = True
        elif kind is Kind.STORM:
            self.network.weather = self.drawn.storm
        elif kind in (Kind.CUT, Kind.SPLIT):
            self.network.cut(subject, other)
            if kind is Kind.SPLIT:
                self.network.cut(other, subject)

    def _lift(self, fault: Fault) -> None:
        if not {fault.subject, fault.other} & self.lost:
            self.lift(fault.kind, fault.subject, fault.other)

    def lift(self, kind: Kind, subject: str, other: str = "") -> None:
        """The end of a fault; harmless when there is none. What was killed is started again by others."""
        process = self.processes.get(subject)
        if kind is Kind.STOP and process is not None:
            process.go_on()
        elif kind is Kind.SLOW:
            self._health[subject].slowness = 1.0
        elif kind is Kind.SICK:
            self._health[subject].is_sick = False
        elif kind is Kind.STORM:
            self.network.weather = self.drawn.calm
        elif kind in (Kind.CUT, Kind.SPLIT):
            self.network.mend(subject, other)
            if kind is Kind.SPLIT:
                self.network.mend(other, subject)

    # The end of faults

    def heal(self, rng: random.Random) -> tuple[list[str], list[str]]:
        """End all faults, but those that befall what is not needed, for good; returns the hosts and routers of the
        core, which is whole from now on."""
        self.lift(Kind.STORM, "everything")
        for name in self.processes:
            self.lift(Kind.STOP, name)
        for name in self._health:
            self.lift(Kind.SLOW, name)
            self.lift(Kind.SICK, name)
        for source, target in sorted(self.network.blocked):
            self.network.mend(source, target)
        hosts, routers = self._core(rng)
        if any(wished.wish in (Wish.DRAIN, Wish.HOSTS) for wished in self.drawn.wishes):
            # Nobody knows yet who gets what a drained host had, or what one gets that was added.
            return hosts, routers
        for name in (*self.drawn.hosts, *self.drawn.routers):
            if name not in hosts and name not in routers and rng.random() < 0.7:
                self._lose(rng, name)
        return hosts, routers

    def _core(self, rng: random.Random) -> tuple[list[str], list[str]]:
        """One router, and as few hosts as hold every expert."""
        journal = self._disk.read()
        moves = journal.moves
        assert moves is not None
        placements = (journal.target, moves.goal, moves.published)
        hosts = list(self._host_names())
        for name in rng.sample(hosts, len(hosts)):
            rest = set(hosts) - {name}
            if all(rest & set(names) for placement in placements for names in placement.values()):
                hosts.remove(name)
        return hosts, [rng.choice(self.drawn.routers)]

    def _lose(self, rng: random.Random, name: str) -> None:
        is_host = name in self._host_names()
        illnesses = (Kind.KILL, Kind.STOP, Kind.SLOW, Kind.SICK, Kind.CUT) if is_host else (Kind.KILL, Kind.STOP)
        illness = rng.choice(illnesses)
        self.world.note("fault", f"{illness} {name} for good")
        self.lost.add(name)
        if illness is Kind.CUT:
            for router in self.drawn.routers:
                one, other = rng.sample((name, router), 2)
                self.befall(illness, one, other)
        else:
            self.befall(illness, name)

    def has_converged(self, hosts: list[str]) -> bool:
        """Whether the placement lists every replica of `hosts`."""
        state = self.controller.state
        replicas = state.placement.replicas
        wanted = {key: set(names) & set(hosts) for key, names in state.moving.goal.items()}
        return all(replicas.get(key) and names <= set(replicas[key]) for key, names in wanted.items())
