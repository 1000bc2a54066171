"""How the simulated processes and the controller talk: a stream on which reports go up and orders or views come down.

The timing is that of `experts.grpc_control` and of `cluster.control.grpc_server`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.control.core import start, step
from cluster.control.grpc_server import HEARTBEAT_S, TICK_S, TURN_S
from cluster.control.journal import decode, encode
from cluster.control.state import (
    Alarmed,
    Asked,
    ControllerState,
    Effect,
    EndHost,
    EnsureHost,
    Event,
    HostGone,
    HostReported,
    Journal,
    LoadRead,
    MemberReported,
    PublishView,
    SendOrder,
    Steering,
    Tick,
    Timing,
    WriteJournal,
)
from cluster.simulate.counted_load import CountedLoad
from cluster.simulate.network import Corrupt, End, Network
from cluster.simulate.process import Process
from experts.errors import InvalidInput
from experts.grpc_control import FIRST_BACKOFF_S, LAST_BACKOFF_S, REPORT_EVERY_S, SILENCE_S
from experts.placement import ClusterView
from experts.reports import HostOrder, HostReport, MemberReport

ADDRESS = "controller"

Report = HostReport | MemberReport
Message = ClusterView | HostOrder | None


class ControlLink:
    """One process's link to the controller; None among the messages is a sign of life."""

    def __init__(
        self, network: Network, process: Process, report: Callable[[], Report], take: Callable[[Any], None]
    ) -> None:
        self._network = network
        self._process = process
        self._report = report
        self._take = take
        self._end: End | None = None
        self._heard_at = 0.0
        self._pause_s = FIRST_BACKOFF_S

    def start(self) -> None:
        self._dial()
        self._pulse()

    def poke(self) -> None:
        """Report now."""
        if self._end is not None:
            self._end.send(self._report())

    def _dial(self) -> None:
        self._network.dial(self._process, ADDRESS, self._opened, lambda problem: self._ended())

    def _opened(self, end: End) -> None:
        end.on_message = self._heard
        end.on_end = self._ended
        self._end = end
        self._heard_at = self._process.world.now
        self.poke()

    def _heard(self, message: Any) -> None:
        if isinstance(message, Corrupt):
            self._hang_up()
            return
        self._heard_at = self._process.world.now
        self._pause_s = FIRST_BACKOFF_S
        if message is not None:
            self._take(message)

    def _pulse(self) -> None:
        if self._end is not None and self._process.world.now - self._heard_at > SILENCE_S:
            self._hang_up()
        self.poke()
        self._process.after(REPORT_EVERY_S, self._pulse)

    def _hang_up(self) -> None:
        if self._end is not None:
            self._end.close()
            self._ended()

    def _ended(self) -> None:
        self._end = None
        self._process.after(self._pause_s * self._process.world.rng.uniform(0.7, 1.3), self._dial)
        self._pause_s = min(2 * self._pause_s, LAST_BACKOFF_S)


class MemberLink(ControlLink):
    """What routers and ingresses hold: the newest view counts, whatever comes when."""

    def __init__(
        self,
        network: Network,
        process: Process,
        report: Callable[[ClusterView], MemberReport],
        on_view: Callable[[ClusterView], None],
    ) -> None:
        self.view = ClusterView()
        self._on_view = on_view
        super().__init__(network, process, lambda: report(self.view), self._newer)

    def _newer(self, view: ClusterView) -> None:
        if view.version > self.view.version:
            self.view = view
            self._on_view(view)


class Disk:
    """What outlives the controller."""

    def __init__(self, journal: Journal) -> None:
        self._written = encode(journal)

    def read(self) -> Journal:
        return decode(self._written)

    def write(self, journal: Journal) -> None:
        self._written = encode(journal)


class Controller:
    """A life of the controller: the real core, with streams, ticks and a disk of the simulation."""

    def __init__(
        self,
        network: Network,
        process: Process,
        disk: Disk,
        hosts: tuple[str, ...],
        timing: Timing,
        steering: Steering,
        ensure_host: Callable[[str], None],
        end_host: Callable[[str], None],
        on_publish: Callable[[ControllerState, ClusterView], None],
    ) -> None:
        self._process = process
        self._disk = disk
        self._ensure_host = ensure_host
        self._end_host = end_host
        self._on_publish = on_publish
        self._num_streams = 0
        self._streams: dict[int, End] = {}
        self._members: set[int] = set()
        self._view: ClusterView | None = None
        self._load = CountedLoad()
        self.state: ControllerState
        self.state, effects = start(disk.read(), hosts, process.world.now, timing, steering)
        self._carry_out(effects)
        network.listen(ADDRESS, process, self._accept)
        self._tick()
        self._turn()

    def ask(self, asked: Asked) -> None:
        """What a person wants; InvalidInput is an answer."""
        try:
            self._feed(asked)
        except InvalidInput as error:
            self._process.note(f"refuses: {error}")

    def _turn(self) -> None:
        self._feed(LoadRead(load=self._load.load(self.state, self._process.world.now)))
        self._process.after(TURN_S, self._turn)

    def _tick(self) -> None:
        self._feed(Tick())
        self._process.after(TICK_S, self._tick)

    def _feed(self, event: Event) -> None:
        self.state, effects = step(self.state, event, self._process.world.now)
        self._carry_out(effects)

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case WriteJournal(journal=journal):
                    self._disk.write(journal)
                case PublishView(view=view):
                    self._publish(view)
                case SendOrder(stream=stream, order=order):
                    if stream in self._streams:
                        self._streams[stream].send(order)
                case Alarmed(text=text):
                    self._process.note(f"alarm: {text}")
                case EnsureHost(name=name):
                    self._process.note(f"starts {name}")
                    self._ensure_host(name)
                case EndHost(name=name):
                    self._process.note(f"ends {name}")
                    self._end_host(name)

    def _publish(self, view: ClusterView) -> None:
        self._process.note(f"view {view.version}, epoch {view.placement.epoch}")
        self._view = view
        self._on_publish(self.state, view)
        for stream in sorted(self._members):
            self._streams[stream].send(view)

    def _accept(self, end: End) -> None:
        self._num_streams += 1
        stream = self._num_streams
        self._streams[stream] = end
        names: dict[str, None] = {}

        def take(report: Report | Corrupt) -> None:
            if isinstance(report, Corrupt):
                end.close()
                gone()
            elif isinstance(report, HostReport):
                names[report.name] = None
                self._feed(HostReported(report=report, stream=stream))
            else:
                self._attend(stream, end)
                self._feed(MemberReported(report=report))

        def gone() -> None:
            del self._streams[stream]
            self._members.discard(stream)
            for name in names:
                self._feed(HostGone(name=name, stream=stream))

        end.on_message, end.on_end = take, gone
        self._beat(end)

    def _attend(self, stream: int, end: End) -> None:
        if stream not in self._members:
            self._members.add(stream)
            if self._view is not None:
                end.send(self._view)

    def _beat(self, end: End) -> None:
        if end.open:
            end.send(None)
            self._process.after(HEARTBEAT_S, lambda: self._beat(end))
