"""The failover machine on random histories: hosts answer, hang, die, restart, lack experts and move as they like.

`failover_world.World` checks after every event what must always hold: sends bounded and only to listed hosts, hedges
within their budget, nothing open that nothing is under way for, nothing waiting without a timer; here, that every row
of every dispatch ends answered once or lost once, and that all is well again when the faults stop.
"""

from __future__ import annotations

from failover_world import ON_TIME_S, Host, World
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.failover.events import HostState
from router.failover.state import Policy, next_timer

HOSTS = "abcd"
KEYS = [(0, expert) for expert in range(4)]
hosts = st.sampled_from(HOSTS)
latencies = st.sampled_from([0.0005, 0.002, 0.01, 0.05, 0.3, 3.0])
replicas = st.fixed_dictionaries(
    {key: st.text(HOSTS, min_size=1, max_size=3).map(set).map(sorted) for key in KEYS}
).map(lambda table: {key: "".join(names) for key, names in table.items()})


class RouterAmongHosts(RuleBasedStateMachine):
    @initialize(table=replicas)
    def begin(self, table: dict[tuple[int, int], str]) -> None:
        self.world = World(table, Policy(base_s=1.0, per_row_s=0.0))
        for name in HOSTS:
            self.world.hosts.setdefault(name, Host())
        self.world.view()
        self.open: list[int] = []

    @rule(rows=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 200), min_size=1))
    def dispatch(self, rows: dict[tuple[int, int], int]) -> None:
        self.world.dispatch(rows)

    @rule(rows=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 3), min_size=1), times=st.integers(5, 40))
    def dispatch_often(self, rows: dict[tuple[int, int], int], times: int) -> None:
        self.world.run(rows, times)

    @precondition(lambda self: len(self.open) < 3)
    @rule(rows=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 50), min_size=1))
    def begin_another(self, rows: dict[tuple[int, int], int]) -> None:
        self.open.append(self.world.begin(rows))

    @precondition(lambda self: self.open)
    @rule()
    def finish_one(self) -> None:
        self.world.finish(self.open.pop(0))

    @rule(late_s=st.sampled_from([0.0, 0.02, 0.2, 5.0]))
    def look(self, late_s: float) -> None:
        timer = next_timer(self.world.state)
        self.world.look(timer if timer < float("inf") else 0.0, late_s)

    @rule(name=hosts, latency_s=latencies)
    def change_pace(self, name: str, latency_s: float) -> None:
        self.world.hosts[name].latency_s = latency_s

    @rule(name=hosts)
    def hang(self, name: str) -> None:
        self.world.hang(name)

    @rule(name=hosts, latency_s=latencies)
    def wake(self, name: str, latency_s: float) -> None:
        self.world.wake(name, latency_s)

    @rule(name=hosts)
    def kill(self, name: str) -> None:
        self.world.kill(name)

    @rule(name=hosts)
    def link_again(self, name: str) -> None:
        self.world.hosts[name].is_linked = True

    @rule(name=hosts)
    def restart(self, name: str) -> None:
        self.world.kill(name)
        self.world.restart(name)

    @rule(name=hosts, keys=st.frozensets(st.sampled_from(KEYS)))
    def lack(self, name: str, keys: frozenset[tuple[int, int]]) -> None:
        self.world.hosts[name].lacks = keys

    @rule(table=replicas)
    def publish(self, table: dict[tuple[int, int], str]) -> None:
        self.world.view(table)

    @rule(in_s=st.sampled_from([0.01, 0.5, 60.0]))
    def begin_step(self, in_s: float) -> None:
        self.world.begin_step(self.world.now + in_s)

    @rule(seconds=st.sampled_from([0.005, 0.3, 5.0]))
    def idle(self, seconds: float) -> None:
        self.world.idle(seconds)

    @invariant()
    def every_deadline_is_bounded(self) -> None:
        policy = self.world.state.policy
        for flight in self.world.state.flights.values():
            assert flight.deadline - flight.sent_clock <= max(policy.base_s, policy.probe_s) + 1e-9

    def teardown(self) -> None:
        """The faults stop: everything is finished, and every host serves again."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for name, host in world.hosts.items():
            host.lacks = frozenset()
            host.is_linked = True
            world.wake(name, ON_TIME_S)
        for number in self.open:
            world.finish(number)
        world.idle(90.0)
        world.view(dict.fromkeys(KEYS, HOSTS))
        world.begin_step()
        assert world.available(*KEYS)
        for _ in range(400):
            assert not world.dispatch(dict.fromkeys(KEYS, 1)).lost
        assert HostState.DEAD not in world.states().values()
        assert HostState.SILENT not in world.states().values()


TestRouterAmongHosts = RouterAmongHosts.TestCase
TestRouterAmongHosts.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
