"""Connections between simulated processes, and what a network does to them.

There are two tempers. A *stream* is what TCP makes of a network: messages come whole and in order, or the connection
ends at both sides; what meets a partition comes when that is over. In a *rough* connection every message fares for
itself: it is lost, doubled, overtaken. Corruption hits one message in either; what a receiver makes of `Corrupt` is its
own wire's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.simulate.process import Process
from cluster.simulate.world import World

DIAL_TIMEOUT_S = 1.0


@dataclass(kw_only=True)
class Weather:
    """What a message meets. `delay_s` is the mean of one way; the others are probabilities for each message.

    `loss` breaks a stream, for a lost message never shows in one; `doubled` and `overtaken` are for rough connections.
    """

    delay_s: float = 0.0005
    loss: float = 0.0
    doubled: float = 0.0
    overtaken: float = 0.0
    corrupt: float = 0.0

    def calm(self) -> None:
        """The end of all of it but delay."""
        self.loss = self.doubled = self.overtaken = self.corrupt = 0.0


@dataclass(frozen=True, kw_only=True)
class Corrupt:
    """A message some of whose bits are wrong. `in_head`: where it says what it is."""

    message: Any
    in_head: bool


Accept = Callable[["End"], None]


class End:
    """One side of a connection. `on_message` and `on_end` are called in actions of `process`."""

    def __init__(self, network: Network, process: Process, rough: bool) -> None:
        self.process = process
        self.open = True
        self.on_message: Callable[[Any], None] = lambda message: None
        self.on_end: Callable[[], None] = lambda: None
        self.peer: End
        self._network = network
        self._rough = rough
        self._opens_at = self._last_arrival = 0.0
        self._held: list[tuple[Any, bool]] = []
        process.at_death.append(self.close)

    def send(self, message: Any) -> None:
        """Send to the other side, which may or may not get it."""
        if self.open:
            self._network.send(self, message, self._rough)

    def close(self) -> None:
        """End the connection; the other side learns it after what was sent before."""
        if self.open:
            self._forget()
            self._network.finish(self)

    def broken(self) -> None:
        """The network ended the connection."""
        if self.open:
            self._forget()
            self.process.run(self.on_end)

    def _forget(self) -> None:
        self.open = False
        if self.process.alive:
            self.process.at_death.remove(self.close)


@dataclass(kw_only=True)
class Network:
    """All links of the simulated cluster. Partitions name processes by their names, whatever their lives."""

    world: World
    weather: Weather = field(default_factory=Weather)
    blocked: set[tuple[str, str]] = field(default_factory=set)
    """(from, to): nothing gets through in this direction."""
    _listeners: dict[str, tuple[Process, Accept]] = field(default_factory=dict)
    _ends: dict[End, None] = field(default_factory=dict)

    def listen(self, address: str, process: Process, accept: Accept) -> None:
        """Accept connections at `address` while `process` lives."""
        self._listeners[address] = (process, accept)

    def dial(
        self,
        process: Process,
        address: str,
        on_open: Callable[[End], None],
        on_failure: Callable[[str], None],
        rough: bool = False,
    ) -> None:
        """Connect to `address`. A stopped process can be connected to: its operating system does it."""
        server, accept = self._listeners.get(address, (None, None))
        if server is not None and self._is_blocked(process, server):
            process.after(DIAL_TIMEOUT_S, lambda: on_failure("no answer"))
        elif server is None or not server.alive or accept is None:
            process.after(2 * self._delay(), lambda: on_failure("connection refused"))
        else:
            end, peer = End(self, process, rough), End(self, server, rough)
            end.peer, peer.peer = peer, end
            self._ends |= {end: None, peer: None}
            peer._opens_at = self.world.now + self._delay()
            end._opens_at = peer._opens_at + self._delay()
            self.world.at(peer._opens_at, lambda: server.run(lambda: accept(peer)))

            def opened() -> None:
                # Nobody listened yet when the connection ended.
                if end.open:
                    on_open(end)
                else:
                    on_failure("connection reset")

            self.world.at(end._opens_at, lambda: process.run(opened))

    def cut(self, source: str, target: str) -> None:
        """Let nothing through from `source` to `target`."""
        self.blocked.add((source, target))

    def mend(self, source: str, target: str) -> None:
        """The end of `cut`: streams deliver what they hold."""
        if (source, target) not in self.blocked:
            return
        self.blocked.remove((source, target))
        for end in [end for end in self._ends if (end.process.name, end.peer.process.name) == (source, target)]:
            held, end._held = end._held, []
            for message, is_last in held:
                self._deliver(end, message, self._delay(), in_order=True, is_last=is_last)

    def send(self, end: End, message: Any, rough: bool) -> None:
        weather, rng = self.weather, self.world.rng
        if weather.corrupt and rng.random() < weather.corrupt:
            message = Corrupt(message=message, in_head=rng.random() < 0.5)
        lost = weather.loss and rng.random() < weather.loss
        if rough:
            if lost or self._is_cut(end):
                return
            for _ in range(2 if rng.random() < weather.doubled else 1):
                late = rng.random() < weather.overtaken
                self._deliver(end, message, self._delay() * (20 if late else 1), in_order=False)
        elif lost:
            self._ends.pop(end, None)
            self._ends.pop(end.peer, None)
            end.process.after(0.0, end.broken)
            end.peer.process.after(self._delay(), end.peer.broken)
        elif self._is_cut(end):
            end._held.append((message, False))
        else:
            self._deliver(end, message, self._delay(), in_order=True)

    def finish(self, end: End) -> None:
        """Tell the other side of the end of the connection, as soon as anything gets through."""
        if self._is_cut(end):
            end._held.append((None, True))
        else:
            self._deliver(end, None, self._delay(), in_order=True, is_last=True)

    def _deliver(self, end: End, message: Any, delay_s: float, *, in_order: bool, is_last: bool = False) -> None:
        peer = end.peer
        arrival = max(self.world.now + delay_s, peer._opens_at)
        if in_order:
            arrival = max(arrival, end._last_arrival)
        end._last_arrival = max(arrival, end._last_arrival)
        self.world.at(arrival, lambda: peer.process.run(lambda: self._arrive(peer, message, is_last)))

    def _arrive(self, end: End, message: Any, is_last: bool) -> None:
        if is_last:
            end.broken()
            self._ends.pop(end, None)
            self._ends.pop(end.peer, None)
        elif end.open:
            end.on_message(message)

    def _delay(self) -> float:
        return self.weather.delay_s * self.world.rng.uniform(0.5, 1.5)

    def _is_cut(self, end: End) -> bool:
        return (end.process.name, end.peer.process.name) in self.blocked

    def _is_blocked(self, one: Process, other: Process) -> bool:
        return bool({(one.name, other.name), (other.name, one.name)} & self.blocked)
