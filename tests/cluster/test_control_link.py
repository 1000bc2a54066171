"""The controller's listener and the links to it, over real gRPC in one process."""

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import pytest
from certificates import Authority, needs_openssl

from cluster.control.grpc_server import ControlServer, Listener
from cluster.control.journal import JournalFile
from cluster.control.pack import pack
from cluster.control.state import Journal, Timing
from experts.errors import ControllerUnreachable, InvalidInput
from experts.grpc_control import HostLink, MemberLink, ask_drain, ask_shutdown, fetch_status
from experts.placement import ClusterView, ExpertKey
from experts.reports import HostOrder, HostReport, MemberKind, MemberReport
from experts.tls import Identity

HOSTS = ("h0", "h1")
TARGET = pack(layers=[0, 1], num_experts=4, hosts=HOSTS, num_replicas=1)
PATIENCE_S = 30.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for `condition`; generous, because it only ends a test that has failed."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.01)


@dataclass
class FakeExecutor:
    """Remembers what it was asked."""

    asked: list[str] = field(default_factory=list)
    trouble: str = ""
    left: threading.Event = field(default_factory=threading.Event)

    def ensure_host(self, name: str) -> None:
        self.asked.append(name)
        if self.trouble:
            raise RuntimeError(self.trouble)

    def end_host(self, name: str) -> None:
        self.asked.append(f"end {name}")

    def ask_room(self, num_hosts: int) -> None:
        self.asked.append(f"room for {num_hosts}")

    def leave(self, hosts: Iterable[str]) -> None:
        self.left.set()


class World:
    """A journal on disk, and the controller that lives on it now."""

    def __init__(self, folder: Path) -> None:
        self.journal = JournalFile(folder / "journal.json")
        self.executor = FakeExecutor()
        self.server: ControlServer | None = None
        self.address = ""

    def begin(self, port: int = 0, timing: Timing | None = None, tls: Identity | None = None) -> None:
        self.server = ControlServer(
            name="herd",
            journal=self.journal,
            fresh=Journal(digest="d", target=TARGET),
            hosts=HOSTS,
            executor=self.executor,
            listener=Listener(port=port, tls=tls),
            node="127.0.0.1",
            timing=timing,
        )
        self.address = self.server.start()

    def end(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None

    def resolve(self) -> str:
        return self.address


class FakeHost:
    """A host that holds what it is ordered to at once."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.held: frozenset[ExpertKey] = frozenset()
        self.orders: list[HostOrder] = []
        self.link = HostLink(resolve=world.resolve, report=self._report, on_order=self._obey)

    def _report(self) -> HostReport:
        return HostReport(name=self.name, incarnation=1, address=f"{self.name}:1", pid=7, held=self.held)

    def _obey(self, order: HostOrder) -> None:
        self.orders.append(order)
        self.held = order.target
        self.link.poke()


class FakeMember:
    """A router that keeps every view."""

    def __init__(
        self, name: str, world: World, kind: MemberKind = MemberKind.ROUTER, tls: Identity | None = None
    ) -> None:
        self.views: list[ClusterView] = []
        report = MemberReport(kind=kind, name=name, address="127.0.0.1:9", running=2, http="http://x")
        self.link = MemberLink(resolve=world.resolve, report=lambda: report, on_view=self.views.append, tls=tls)

    @property
    def epoch(self) -> int:
        return self.link.view.placement.epoch


@contextmanager
def linked(*parts: FakeHost | FakeMember) -> Iterator[None]:
    with ExitStack() as stack:
        for part in parts:
            part.link.start()
            stack.callback(part.link.close)
        yield


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.begin()
    yield world
    world.end()


def serving(member: FakeMember) -> bool:
    return len(member.link.view.placement.replicas) == len(TARGET)


def test_hosts_are_ordered_and_members_see_what_serves(world: World) -> None:
    hosts = [FakeHost(name, world) for name in HOSTS]
    router, ingress = FakeMember("r0", world), FakeMember("i0", world, MemberKind.INGRESS)
    with linked(*hosts, router, ingress):
        until(lambda: serving(router) and serving(ingress) and "r0" in ingress.link.view.routers, "all serve")
        for host in hosts:
            assert host.orders[0].target == {key for key, names in TARGET.items() if host.name in names}
        view = ingress.link.view
        assert view.placement.replicas == TARGET
        assert view.hosts["h1"].address == "h1:1"
        status = fetch_status(world.address)
        assert [(host.name, host.state, host.slots) for host in status.hosts] == [
            ("h0", "ready", 4),
            ("h1", "ready", 4),
        ]
        assert [(item.name, item.running) for item in status.routers] == [("r0", 2)]
        assert [item.http for item in status.ingresses] == ["http://x"]
        assert (status.replicas_held, status.replicas_wanted) == (8, 8)
        assert status.controller.address == world.address
        assert status.controller.epoch == view.placement.epoch
        assert set(world.executor.asked) == set(HOSTS)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same port", "another port"])
def test_a_controller_that_comes_back_is_found_and_goes_on(world: World, elsewhere: bool) -> None:
    hosts = [FakeHost(name, world) for name in HOSTS]
    router = FakeMember("r0", world)
    with linked(*hosts, router):
        until(lambda: serving(router), "all serve")
        first_address = world.address
        world.end()
        until(lambda: not router.link.connected, "the loss is noticed")
        # Views may have come until the very end.
        before, num_views = router.link.view, len(router.views)
        assert serving(router) and before == router.views[-1], "the last view is kept"
        with blocked(first_address) if elsewhere else ExitStack():
            world.begin()
            assert (world.address == first_address) is not elsewhere
            until(lambda: len(router.views) > num_views, "a new view")
            assert router.link.view.placement == before.placement
            assert router.link.view.version > before.version
            assert fetch_status(world.address).controller.term == 2
    versions = [view.version for view in router.views]
    assert versions == sorted(set(versions))


@contextmanager
def blocked(address: str) -> Iterator[None]:
    """Somebody else took the port meanwhile."""
    host, _, port = address.rpartition(":")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, int(port)))
        taken.listen()
        yield


def test_a_link_waits_for_a_controller_that_is_not_there_yet(tmp_path: Path) -> None:
    world = World(tmp_path)

    def resolve() -> str:
        if not world.address:
            raise ControllerUnreachable("", "not started yet")
        return world.address

    router = FakeMember("r0", world)
    router.link = MemberLink(
        resolve=resolve,
        report=lambda: MemberReport(kind=MemberKind.ROUTER, name="r0"),
        on_view=router.views.append,
    )
    with linked(router):
        assert not router.link.connected
        world.begin()
        until(lambda: router.link.connected, "the link comes up")
        assert router.link.away_s() < PATIENCE_S
    world.end()


def test_a_handler_that_raises_does_not_cost_the_link(world: World) -> None:
    calls: list[int] = []

    def on_view(view: ClusterView) -> None:
        calls.append(view.version)
        raise KeyError("a mistake")

    report = MemberReport(kind=MemberKind.ROUTER, name="r0")
    link = MemberLink(resolve=world.resolve, report=lambda: report, on_view=on_view)
    link.start()
    until(lambda: bool(calls), "a view")
    ask_drain(world.address)
    until(lambda: link.view.draining, "the next view")
    link.close()


def test_a_taken_port_is_a_start_up_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        world = World(tmp_path)
        with pytest.raises(InvalidInput) as caught:
            world.begin(port=taken.getsockname()[1])
        assert caught.value.field == "control-port"


def test_two_controllers_never_share_a_port(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "..")
    with pytest.raises(InvalidInput):
        other.begin(port=int(world.address.rpartition(":")[2]))


def test_what_cannot_be_started_is_told_and_asked_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.executor.trouble = "no room on any node"
    world.begin(timing=Timing(ensure_again=0.1))
    until(lambda: world.executor.asked.count("h0") >= 2, "asked again")
    until(lambda: any("no room" in problem for problem in fetch_status(world.address).problems), "told")
    world.executor.trouble = ""
    until(lambda: not fetch_status(world.address).problems, "forgotten once it works")
    world.end()


def test_shutdown_reaches_the_executor(world: World) -> None:
    ask_shutdown(world.address)
    assert world.executor.left.wait(PATIENCE_S)


def test_nobody_answers_is_an_error_with_a_name() -> None:
    with pytest.raises(ControllerUnreachable):
        fetch_status("127.0.0.1:1", timeout_s=2.0)


@needs_openssl
def test_with_tls_strangers_are_not_answered(tmp_path: Path) -> None:
    ours = Authority(tmp_path / "ours").issue("ours").identity()
    theirs = replace(Authority(tmp_path / "theirs").issue("theirs").identity(), ca=ours.ca)
    guarded = World(tmp_path)
    guarded.begin(tls=ours)
    try:
        assert fetch_status(guarded.address, tls=ours).name == "herd"
        with pytest.raises(ControllerUnreachable, match="perhaps it wants TLS"):
            fetch_status(guarded.address)
        with pytest.raises(ControllerUnreachable, match="each end wants to see a certificate"):
            fetch_status(guarded.address, tls=theirs)
        member, stranger = FakeMember("r0", guarded, tls=ours), FakeMember("r1", guarded, tls=theirs)
        with linked(member, stranger):
            until(lambda: bool(member.views) and "r0" in member.views[-1].routers, "the member is linked")
        assert [router.name for router in fetch_status(guarded.address, tls=ours).routers] == ["r0"]
        assert stranger.views == []
    finally:
        guarded.end()


def test_nonsense_on_the_wire_ends_only_its_own_stream(world: World) -> None:
    router = FakeMember("r0", world)
    with linked(router):
        until(lambda: router.link.connected, "the link comes up")
        with grpc.insecure_channel(world.address) as channel:
            for method in ("AttendHost", "AttendMember"):
                call = channel.stream_stream(f"/herd.control.v1.ControlService/{method}")
                with pytest.raises(grpc.RpcError):
                    list(call(iter([b"\xff\xff\xff\xff not a message"]), timeout=PATIENCE_S))
        assert fetch_status(world.address).routers[0].name == "r0"


def test_a_report_of_unknown_kind_ends_only_its_own_stream(world: World) -> None:
    with grpc.insecure_channel(world.address) as channel:
        call = channel.stream_stream("/herd.control.v1.ControlService/AttendMember")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([b"\x08\x63"]), timeout=PATIENCE_S))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fetch_status(world.address).routers == ()
