"""A simulated expert host: the real slots and the real following of orders behind a listener of the simulation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.order_follower import OrderFollower
from cluster.simulate.control import ControlLink
from cluster.simulate.model import HashArithmetic, SlowDisk
from cluster.simulate.network import Corrupt, End, Network
from cluster.simulate.process import Process
from cluster.simulate.transport import Answer, Ask, Hello
from experts.errors import DeadlinePassed, HostFailed, TransportError
from experts.ffn import ExpertWeights
from experts.host import ExpertHost
from experts.placement import ExpertKey
from experts.reports import HostReport, Peer

TOUCH_S, ROW_S = 0.0015, 0.00005
"""What a touched expert and a row of it cost."""


@dataclass(kw_only=True)
class Health:
    """How well a host's machine is, life after life: how many times as long as usual everything takes, and whether
    computations fail."""

    slowness: float = 1.0
    is_sick: bool = False


class HostListener:
    """Answers shipments with `host`, one after another, for all its routers."""

    def __init__(
        self, network: Network, process: Process, host: ExpertHost, *, address: str, incarnation: int, health: Health
    ) -> None:
        self._process = process
        self._host = host
        self._incarnation = incarnation
        self._health = health
        self._asked: deque[tuple[End, Ask]] = deque()
        self._busy = False
        network.listen(address, process, self._accept)

    def _accept(self, end: End) -> None:
        end.on_message = lambda message: self._take(end, message)
        end.send(Hello(host=self._process.name, incarnation=self._incarnation))

    def _take(self, end: End, message: Ask | Corrupt) -> None:
        if isinstance(message, Corrupt):
            # What cannot be read ends the stream, and nothing else.
            end.close()
            return
        self._asked.append((end, message))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = bool(self._asked)
        if not self._busy:
            return
        end, ask = self._asked.popleft()
        outcome, cost_s = self._compute(ask)
        self._process.after(cost_s * self._health.slowness, lambda: self._answer(end, ask, outcome))

    def _answer(self, end: End, ask: Ask, outcome: torch.Tensor | TransportError) -> None:
        end.send(Answer(seq=ask.seq, outcome=outcome, incarnation=self._incarnation))
        self._next()

    def _compute(self, ask: Ask) -> tuple[torch.Tensor | TransportError, float]:
        if ask.left_s <= 0:
            return DeadlinePassed(self._process.name, "the deadline had passed on arrival"), 0.0
        if self._health.is_sick:
            return HostFailed(self._process.name, "the computation failed"), TOUCH_S
        shipment = ask.shipment
        cost_s = TOUCH_S * len(shipment.segments) + ROW_S * shipment.rows_TH.shape[0]
        try:
            return self._host.compute(shipment), cost_s
        except TransportError as error:
            return error, 0.0


class SimulatedHost:
    """One life of a host: slots, the following of orders, reports, and a listener."""

    def __init__(
        self,
        network: Network,
        process: Process,
        *,
        address: str,
        incarnation: int,
        load_s: float,
        health: Health,
        peer: Callable[[str], ExpertHost],
    ) -> None:
        """`peer` gives the slots of another host; it raises HostLost where that is not reached."""
        self._name = process.name
        self._address = address
        self._incarnation = incarnation
        disk = SlowDisk(process.threads.sleep, load_s)
        self.host = ExpertHost(process.name, disk, HashArithmetic())

        def fetch(source: Peer, key: ExpertKey, bytes_per_s: float) -> ExpertWeights:
            process.threads.sleep(load_s / 2)
            return peer(source.name).slot(key).weights

        self._follower = OrderFollower(
            self.host, on_progress=lambda: self._link.poke(), leave=process.exit, fetch=fetch, threads=process.threads
        )
        self._link = ControlLink(network, process, self.report, self._follower.take)
        HostListener(network, process, self.host, address=address, incarnation=incarnation, health=health)
        self._follower.start()
        self._link.start()

    def report(self) -> HostReport:
        result, load = self._follower.result, self.host.load_snapshot()
        return HostReport(
            name=self._name,
            incarnation=self._incarnation,
            address=self._address,
            held=self.host.held(),
            rows_total=load.rows_total,
            problem=result.problem,
            failed=result.failed,
            order=result.order,
            rows=load.rows,
            num_shipments=load.num_shipments,
            compute_s=load.compute_s,
            num_damaged=self.host.num_damaged,
        )
