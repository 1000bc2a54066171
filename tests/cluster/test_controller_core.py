"""The controller's rules, told as transcripts, and what must hold in whatever order things happen."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.control.core import start, step
from cluster.control.pack import pack
from cluster.control.state import (
    ControllerState,
    DrainAsked,
    Effect,
    EnsureHost,
    Event,
    HostGone,
    HostReported,
    Journal,
    Leave,
    MemberLeft,
    MemberReported,
    PublishView,
    SendOrder,
    Tick,
    WriteJournal,
)
from cluster.control.status import status_of
from experts.placement import ClusterView, ExpertKey
from experts.reports import ControllerInfo, HostReport, MemberKind, MemberReport

LAYERS = (1, 3)
NUM_EXPERTS = 4


def fresh_journal(hosts: Iterable[str], num_replicas: int = 1) -> Journal:
    names = list(hosts)
    target = pack(layers=LAYERS, num_experts=NUM_EXPERTS, hosts=names, num_replicas=num_replicas)
    return Journal(digest="d", target=target)


@dataclass
class Cluster:
    """A controller with everything it did written down, in readable lines."""

    hosts: tuple[str, ...] = ("h0", "h1")
    num_replicas: int = 1
    now: float = 100.0
    log: list[str] = field(default_factory=list)
    views: list[ClusterView] = field(default_factory=list)
    journals: list[Journal] = field(default_factory=list)
    state: ControllerState = field(init=False)

    def __post_init__(self) -> None:
        self.begin(fresh_journal(self.hosts, self.num_replicas))

    def begin(self, journal: Journal) -> None:
        self.state, effects = start(journal, self.hosts, self.now)
        self._carry_out(effects)

    def restart(self) -> None:
        """The controller dies; the next life has only the journal."""
        self.begin(self.journals[-1])

    def take(self, event: Event) -> list[str]:
        """Feed one event; returns the lines that it caused."""
        before = len(self.log)
        self.state, effects = step(self.state, event, self.now)
        self._carry_out(effects)
        return self.log[before:]

    def wait(self, seconds: float) -> list[str]:
        lines = []
        for _ in range(round(seconds / 0.25)):
            self.now += 0.25
            lines += self.take(Tick())
        return lines

    def target(self, host: str) -> frozenset[ExpertKey]:
        return self.state.hosts[host].target

    def report(self, host: str, *, life: int = 1, held: int | None = None, stream: int = 1) -> list[str]:
        """A report of `host` that holds the first `held` experts of its target; None: all of them."""
        keys = sorted(self.target(host))
        ordered = self.state.hosts[host].ordered
        report = HostReport(
            name=host,
            incarnation=life,
            address=f"{host}:{life}",
            held=frozenset(keys[:held] if held is not None else keys),
            order=ordered.number if ordered is not None else 0,
        )
        return self.take(HostReported(report=report, stream=stream))

    def member(self, name: str, kind: MemberKind = MemberKind.ROUTER, version: int = 0, epoch: int = 0) -> list[str]:
        report = MemberReport(kind=kind, name=name, address=f"{name}:1", view_version=version, view_epoch=epoch)
        return self.take(MemberReported(report=report))

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case PublishView(view=view):
                    self.views.append(view)
                    states = " ".join(f"{host.name}:{host.state}" for host in view.hosts.values())
                    num_replicas = sum(len(names) for names in view.placement.replicas.values())
                    routers = "".join(f" {name}" for name in view.routers)
                    self.log.append(f"view epoch={view.placement.epoch} replicas={num_replicas} {states}{routers}")
                case SendOrder(name=name, stream=stream, order=order):
                    what = "retire" if order.retire else f"hold {len(order.target)}"
                    self.log.append(f"order {name}/{stream}: {what}")
                case EnsureHost(name=name):
                    self.log.append(f"start {name}")
                case WriteJournal(journal=journal):
                    self.journals.append(journal)
                    self.log.append(f"journal term={journal.term} epoch={journal.epoch}")
                case Leave(reason=reason):
                    self.log.append(f"leave: {reason}")


def running(hosts: tuple[str, ...] = ("h0", "h1"), num_replicas: int = 1) -> Cluster:
    """A cluster whose hosts all hold what they shall."""
    cluster = Cluster(hosts=hosts, num_replicas=num_replicas)
    cluster.wait(0.25)
    for host in hosts:
        cluster.report(host)
    return cluster


def alive(cluster: Cluster, seconds: float, hosts: Iterable[str]) -> list[str]:
    """Time passes while `hosts` go on reporting."""
    lines = []
    for _ in range(round(seconds)):
        lines += cluster.wait(1.0)
        for host in hosts:
            known = cluster.state.hosts[host]
            lines += cluster.report(host, life=known.report.incarnation, stream=known.stream)
    return lines


def test_the_start_of_a_cluster() -> None:
    cluster = Cluster()
    assert cluster.log == ["journal term=1 epoch=0"]
    assert cluster.wait(0.25) == ["start h0", "start h1", "view epoch=0 replicas=0 "]
    assert cluster.report("h0", held=0) == ["view epoch=0 replicas=0 h0:loading", "order h0/1: hold 4"]
    assert cluster.report("h0", held=3) == []
    assert cluster.report("h0") == ["journal term=1 epoch=1", "view epoch=1 replicas=4 h0:ready"]
    assert cluster.report("h1", held=2) == ["view epoch=1 replicas=4 h0:ready h1:loading", "order h1/1: hold 4"]
    cluster.now += 0.1
    assert cluster.report("h1") == ["journal term=1 epoch=2", "view epoch=2 replicas=8 h0:ready h1:ready"]
    assert cluster.report("h1") == []
    assert cluster.wait(0.5) == []


def test_a_host_that_ray_restarts_serves_nothing_until_it_has_loaded() -> None:
    cluster = running()
    cluster.take(HostGone(name="h0", stream=1))
    cluster.wait(1.5)
    assert cluster.views[-1].placement.epoch == 2
    assert cluster.report("h0", life=2, held=0, stream=5) == [
        "journal term=1 epoch=3",
        "view epoch=3 replicas=4 h0:loading h1:ready",
        "order h0/5: hold 4",
    ]
    assert cluster.report("h0", life=2, stream=5) == [
        "journal term=1 epoch=4",
        "view epoch=4 replicas=8 h0:ready h1:ready",
    ]


def test_a_broken_stream_alone_takes_nothing_away() -> None:
    cluster = running()
    assert cluster.take(HostGone(name="h0", stream=1)) == []
    cluster.now += 2.0
    assert cluster.report("h0", stream=2)[-1:] == ["order h0/2: hold 4"]
    assert cluster.take(HostGone(name="h0", stream=1)) == [], "the end of an old stream says nothing"
    assert cluster.state.hosts["h0"].stream == 2


def test_a_silent_host_is_lost_started_again_and_adopted_when_it_speaks() -> None:
    cluster = running()
    lines = alive(cluster, 3, ["h1"])
    assert lines == ["journal term=1 epoch=3", "view epoch=3 replicas=4 h0:lost h1:ready"]
    assert alive(cluster, 9, ["h1"]) == []
    assert alive(cluster, 2, ["h1"]) == ["start h0"]
    assert cluster.report("h0") == ["journal term=1 epoch=4", "view epoch=4 replicas=8 h0:ready h1:ready"]


def test_a_restarted_controller_adopts_what_lives() -> None:
    cluster = running()
    cluster.log.clear()
    cluster.restart()
    assert cluster.log == ["journal term=2 epoch=2"]
    assert cluster.report("h0", stream=8) == ["order h0/8: hold 4"], "half a placement is not published"
    assert cluster.report("h1", stream=9) == [
        "view epoch=2 replicas=8 h0:ready h1:ready",
        "order h1/9: hold 4",
    ]
    assert cluster.wait(2.0) == [], "nobody is started"


def test_a_restarted_controller_starts_what_is_missing_after_a_grace_time() -> None:
    cluster = running()
    cluster.restart()
    cluster.report("h0", stream=8)
    assert alive(cluster, 2, ["h0"]) == []
    assert alive(cluster, 1, ["h0"]) == ["start h1", "journal term=2 epoch=3", "view epoch=3 replicas=4 h0:ready"]


def test_a_controller_without_its_journal_goes_on_above_the_numbers_of_its_members() -> None:
    cluster = running()
    last = cluster.views[-1]
    for _ in range(2):
        cluster.restart()
    last = replace(last, version=cluster.state.version + 17)
    cluster.begin(fresh_journal(cluster.hosts))
    cluster.member("r0", version=last.version, epoch=last.placement.epoch)
    for host in cluster.hosts:
        cluster.report(host, stream=20)
    assert cluster.views[-1].version > last.version
    assert cluster.views[-1].placement.epoch > last.placement.epoch


def test_the_controller_blames_nobody_for_its_own_pause() -> None:
    cluster = running()
    cluster.member("r0")
    cluster.now += 30.0
    assert cluster.take(Tick()) == []
    assert cluster.wait(2.0) == []
    assert "h0:lost" in cluster.wait(2.0)[-1]


def test_one_name_has_one_life() -> None:
    cluster = running()
    assert cluster.report("h0", life=7, stream=2)[-1] == "order h0/2: hold 4"
    assert cluster.report("h0", life=1, stream=1) == ["order h0/1: retire"]
    assert cluster.state.hosts["h0"].report.incarnation == 7


def test_a_life_with_a_lower_number_is_taken_when_the_other_one_is_gone() -> None:
    cluster = running()
    cluster.report("h0", life=7, stream=2)
    cluster.take(HostGone(name="h0", stream=2))
    assert cluster.report("h0", life=3, stream=4, held=0)[-1] == "order h0/4: hold 4"


def test_the_experts_of_a_host_that_stays_away_go_to_others_and_back() -> None:
    cluster = running(("h0", "h1", "h2"), num_replicas=2)
    base, epoch = dict(cluster.state.journal.target), cluster.state.journal.epoch
    alive(cluster, 29, ["h1", "h2"])
    assert cluster.state.journal.epoch == epoch + 1, "it serves no more"
    alive(cluster, 15, ["h1", "h2"])
    assert [len(cluster.target(host)) for host in ("h1", "h2")] == [8, 8]
    assert set(cluster.state.placement.replicas.values()) == {("h1", "h2"), ("h2", "h1")}
    assert cluster.views[-1].placement.epoch > epoch + 1
    # The next life of the controller knows; the host comes back, loads, and serves before others give anything up.
    assert not cluster.target("h0")
    cluster.restart()
    for host in ("h1", "h2"):
        cluster.report(host, stream=7)
    assert [len(cluster.target(host)) for host in ("h1", "h2")] == [8, 8]
    cluster.report("h0", life=2, held=0, stream=8)
    for _ in range(20):
        alive(cluster, 1, cluster.hosts)
        assert all(len(names) >= 2 for names in cluster.views[-1].placement.replicas.values()), "make before break"
    assert {key: set(names) for key, names in cluster.views[-1].placement.replicas.items()} == {
        key: set(names) for key, names in base.items()
    }
    assert [cluster.target(host) for host in cluster.hosts] == [
        frozenset(key for key, names in base.items() if host in names) for host in cluster.hosts
    ]


def test_a_host_that_was_only_cut_off_keeps_what_it_has() -> None:
    cluster = running(("h0", "h1", "h2"), num_replicas=2)
    held = cluster.target("h0")
    alive(cluster, 50, ["h1", "h2"])
    back = HostReport(name="h0", incarnation=1, address="h0:1", held=held)
    lines = cluster.take(HostReported(report=back, stream=9))
    assert f"order h0/9: hold {len(held)}" in lines
    cluster.report("h0", stream=9)
    assert held == {key for key, names in cluster.views[-1].placement.replicas.items() if "h0" in names}


def test_a_host_of_a_new_cluster_has_longer_to_come() -> None:
    cluster = Cluster(hosts=("h0", "h1"))
    cluster.report("h0")
    assert not any(line.startswith("order") for line in alive(cluster, 200, ["h0"]))
    assert "order h0/1: hold 8" in alive(cluster, 130, ["h0"])


def test_replicas_are_spread_over_the_nodes_that_hosts_turn_out_to_be_on() -> None:
    cluster = Cluster(hosts=("h0", "h1", "h2", "h3"), num_replicas=2)
    nodes = {"h0": "a", "h1": "a", "h2": "b", "h3": "b"}
    for host, node in nodes.items():
        report = HostReport(name=host, incarnation=1, address=f"{host}:1", node=node)
        cluster.take(HostReported(report=report, stream=1))
    for names in cluster.state.journal.target.values():
        assert {nodes[name] for name in names} == {"a", "b"}
    assert cluster.journals[-1].target == cluster.state.journal.target


def test_a_host_that_is_not_wanted_is_sent_away() -> None:
    cluster = running()
    stray = HostReport(name="h9", incarnation=1)
    assert cluster.take(HostReported(report=stray, stream=3)) == ["order h9/3: retire"]


def test_members_come_and_go() -> None:
    cluster = running()
    view = "view epoch=2 replicas=8 h0:ready h1:ready"
    assert cluster.member("r0") == [f"{view} r0"]
    assert cluster.member("i0", MemberKind.INGRESS) == []
    assert cluster.take(MemberLeft(name="r0")) == [view]
    assert cluster.member("r1") == [f"{view} r1"]
    assert view in alive(cluster, 3, cluster.hosts), "a silent router leaves the view"


def test_draining_reaches_everybody() -> None:
    cluster = running()
    cluster.take(DrainAsked())
    assert cluster.views[-1].draining


def test_a_cluster_that_nobody_uses_leaves() -> None:
    cluster = running()
    cluster.member("i0", MemberKind.INGRESS)
    assert not any(line.startswith("leave") for line in alive(cluster, 60, cluster.hosts))
    assert "leave: no router and no ingress for 60 s" in alive(cluster, 5, cluster.hosts)


def test_a_cluster_waits_longer_for_its_first_member() -> None:
    cluster = running()
    assert not any(line.startswith("leave") for line in alive(cluster, 590, cluster.hosts))
    assert any(line.startswith("leave") for line in alive(cluster, 12, cluster.hosts))


def test_a_host_that_cannot_load_everything_serves_the_rest_and_says_why() -> None:
    cluster = Cluster()
    keys = sorted(cluster.target("h0"))
    report = HostReport(name="h0", incarnation=1, held=frozenset(keys[:3]), problem="shard-2: truncated")
    cluster.take(HostReported(report=report, stream=1))
    assert set(cluster.views[-1].placement.replicas) == set(keys[:3])
    status = status_of(cluster.state, "herd", ControllerInfo(pid=1))
    assert status.problems == ("host h0: shard-2: truncated",)
    assert (status.replicas_held, status.replicas_wanted) == (3, 8)
    assert [host.state for host in status.hosts] == ["loading", "loading"]


def test_a_model_without_routed_experts_needs_no_host() -> None:
    state, _ = start(Journal(digest="d", target={}), [], 0.0)
    state, effects = step(state, Tick(), 0.1)
    assert [type(effect) for effect in effects] == [PublishView]
    assert state.placement.epoch == 0


@pytest.mark.parametrize("num_hosts", [2, 8])
def test_the_start_makes_few_epochs_however_slowly_experts_arrive(num_hosts: int) -> None:
    cluster = Cluster(hosts=tuple(f"h{index}" for index in range(num_hosts)), num_replicas=2)
    for held in range(1, 1 + len(cluster.target("h0"))):
        for host in cluster.hosts:
            cluster.report(host, held=held)
        cluster.wait(0.25)
    assert cluster.views[-1].placement.epoch <= num_hosts
    assert all(len(names) == 2 for names in cluster.views[-1].placement.replicas.values())


class AnyOrder(RuleBasedStateMachine):
    """Hosts, members and the controller live, die and speak in any order."""

    HOSTS = ("h0", "h1", "h2")

    @initialize()
    def begin(self) -> None:
        self.cluster = Cluster(hosts=self.HOSTS, num_replicas=2)
        self.lives = dict.fromkeys(self.HOSTS, 1)
        self.held = {host: frozenset[ExpertKey]() for host in self.HOSTS}
        self.stream = 1
        self.seen = 0
        self.reported: dict[str, tuple[int, frozenset[ExpertKey]]] = {}

    @rule(host=st.sampled_from(HOSTS), count=st.integers(0, 8), problem=st.sampled_from(["", "broken"]))
    def report(self, host: str, count: int, problem: str) -> None:
        keys = sorted(self.cluster.target(host))
        self.held[host] = self.held[host] | frozenset(keys[:count])
        report = HostReport(name=host, incarnation=self.lives[host], held=self.held[host], problem=problem)
        self.reported[host] = (self.lives[host], self.held[host])
        self.cluster.take(HostReported(report=report, stream=self.stream))

    @rule(host=st.sampled_from(HOSTS))
    def rebirth(self, host: str) -> None:
        self.lives[host] += 1
        self.held[host] = frozenset()
        self.stream += 1

    @rule(host=st.sampled_from(HOSTS))
    def hang_up(self, host: str) -> None:
        self.cluster.take(HostGone(name=host, stream=self.stream))

    @rule(name=st.sampled_from(["r0", "r1"]))
    def member(self, name: str) -> None:
        views = self.cluster.views
        version, epoch = (views[-1].version, views[-1].placement.epoch) if views else (0, 0)
        self.cluster.member(name, version=version, epoch=epoch)

    @rule(seconds=st.sampled_from([0.25, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.cluster.wait(seconds)

    @rule(seconds=st.floats(0, 20))
    def pause(self, seconds: float) -> None:
        self.cluster.now += seconds
        self.cluster.take(Tick())

    @rule()
    @precondition(lambda self: self.cluster.journals)
    def restart(self) -> None:
        self.stream += 1
        self.reported.clear()
        self.cluster.restart()

    @invariant()
    def numbers_only_grow(self) -> None:
        views = self.cluster.views
        for before, after in zip(views[self.seen :], views[self.seen + 1 :], strict=False):
            assert after.version > before.version
            assert after.placement.epoch >= before.placement.epoch
            same = after.placement.replicas == before.placement.replicas
            assert same == (after.placement.epoch == before.placement.epoch)
        self.seen = max(len(views) - 1, 0)

    @invariant()
    def the_placement_lists_only_what_hosts_reported_as_held(self) -> None:
        if not self.cluster.views or self.cluster.state.view is None:
            return
        for key, names in self.cluster.views[-1].placement.replicas.items():
            assert len(set(names)) == len(names)
            for name in names:
                assert key in self.reported[name][1]

    @invariant()
    def the_journal_knows_every_published_placement(self) -> None:
        for view in self.cluster.views[-1:]:
            journal = self.cluster.journals[-1]
            assert journal.epoch >= view.placement.epoch


AnyOrder.TestCase.settings = settings(deadline=None, max_examples=80, stateful_step_count=40)
TestAnyOrder = AnyOrder.TestCase
