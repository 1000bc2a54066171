"""The clients of the controller: the link that hosts, routers and ingresses hold, and the calls of commands.

A link re-connects for ever and keeps the last view; nothing that serves waits for it.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc

from experts.errors import ControllerUnreachable, HerdError
from experts.placement import ClusterView, ExpertKey
from experts.reports import AppliedPlan, ClusterStatus, CountedRows, HostOrder, HostReport, MemberReport
from experts.tls import Identity
from experts.transport.grpc_options import client_options
from experts.transport.grpc_security import explain, open_channel
from experts.wire import control_pb2 as pb
from experts.wire.control_pb2_grpc import ControlServiceStub
from experts.wire.placing import (
    Replicas,
    counted_from_wire,
    plan_from_wire,
    raise_refusal,
    rates_to_wire,
    replicas_to_wire,
)
from experts.wire.view import (
    host_report_to_wire,
    keys_from_wire,
    member_report_to_wire,
    order_from_wire,
    status_from_wire,
    view_from_wire,
)

MAX_MESSAGE_BYTES = 32 << 20
REPORT_EVERY_S = 1.0
SILENCE_S = 6.0
"""The controller says something every two seconds; after this it is taken for stopped, and asked for anew."""
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 1.0

log = logging.getLogger(__name__)


class ControlLink(ABC):
    """Keeps one attendance, a streaming call, alive from two threads of its own, until closed.

    `resolve` gives the controller's address of now, and may raise HerdError; it is asked before every attempt, so
    a controller that came back elsewhere is found.
    """

    def __init__(self, name: str, resolve: Callable[[], str], tls: Identity | None) -> None:
        self._resolve = resolve
        self._tls = tls
        self._closed = threading.Event()
        self._poked = threading.Event()
        self._lock = threading.Lock()
        self._call: grpc.Call | None = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._heard_at = time.monotonic()
        self._tried_at = self._heard_at
        self._connected = False
        self._threads = [
            threading.Thread(target=self._attend_for_ever, name=f"{name}-control", daemon=True),
            threading.Thread(target=self._pulse, name=f"{name}-control-pulse", daemon=True),
        ]

    @abstractmethod
    def open(self, stub: Any, reports: Iterator[Any]) -> Any:
        """Open the call on which `reports` go out and messages come in."""

    @abstractmethod
    def report(self) -> Any:
        """The message that tells how things are now."""

    @abstractmethod
    def take(self, message: Any) -> None:
        """Use one message of the controller."""

    def start(self) -> None:
        """Begin; returns at once."""
        for thread in self._threads:
            thread.start()

    def poke(self) -> None:
        """Something changed: report now instead of within a second."""
        self._poked.set()

    def away_s(self) -> float:
        """Seconds since the controller last said anything (since the start, when it never did)."""
        return time.monotonic() - self._heard_at

    @property
    def connected(self) -> bool:
        """The controller has answered on the present connection."""
        return self._connected

    def close(self) -> None:
        """End the link. A thread that hangs in `resolve` is left behind; it is a daemon."""
        self._closed.set()
        self._poked.set()
        self._hang_up()
        for thread in self._threads:
            thread.join(timeout=2.0)

    def _attend_for_ever(self) -> None:
        backoff = FIRST_BACKOFF_S
        while not self._closed.is_set():
            try:
                self._attend(self._resolve())
            except (HerdError, grpc.RpcError) as error:
                log.debug("the controller is away: %s", error)
            backoff = FIRST_BACKOFF_S if self._connected else min(2 * backoff, LAST_BACKOFF_S)
            self._connected = False
            self._closed.wait(backoff * random.uniform(0.7, 1.3))

    def _attend(self, address: str) -> None:
        """Hold one connection until it ends."""
        outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with open_channel(address, client_options(MAX_MESSAGE_BYTES), self._tls) as channel:
            call = self.open(ControlServiceStub(channel), _until_none(outbox))
            with self._lock:
                self._outbox, self._call, self._tried_at = outbox, call, time.monotonic()
            self.poke()
            try:
                if not self._closed.is_set():
                    self._listen(call)
            finally:
                self._hang_up()

    def _listen(self, call: Any) -> None:
        for message in call:
            self._heard_at = time.monotonic()
            self._connected = True
            try:
                self.take(message)
            except Exception:
                # A mistake in the owner's handler must not cost it the link.
                log.exception("a message of the controller could not be used")

    def _pulse(self) -> None:
        """Report every second and whenever poked; hang up on a controller that fell silent."""
        while not self._closed.is_set():
            self._poked.wait(REPORT_EVERY_S)
            self._poked.clear()
            with self._lock:
                open_call = self._call is not None
                silent = time.monotonic() - max(self._heard_at, self._tried_at) > SILENCE_S
            if open_call and silent:
                self._hang_up()
            elif open_call:
                self._outbox.put(self.report())

    def _hang_up(self) -> None:
        with self._lock:
            call, self._call = self._call, None
            self._outbox.put(None)
        if call is not None:
            call.cancel()


class MemberLink(ControlLink):
    """What a router or an ingress holds: tells how it is, receives every new view and keeps the last one.

    `on_view` is called on a thread of the link, one view at a time, with growing versions.
    """

    def __init__(
        self,
        *,
        resolve: Callable[[], str],
        report: Callable[[], MemberReport],
        on_view: Callable[[ClusterView], None],
        tls: Identity | None = None,
    ) -> None:
        self._make_report = report
        self._on_view = on_view
        self._view = ClusterView()
        super().__init__("member", resolve, tls)

    @property
    def view(self) -> ClusterView:
        """The last view received; an empty one before the first."""
        return self._view

    def open(self, stub: Any, reports: Iterator[pb.MemberReport]) -> Any:
        return stub.AttendMember(reports)

    def report(self) -> pb.MemberReport:
        message = member_report_to_wire(self._make_report())
        message.view_version = self._view.version
        message.view_epoch = self._view.placement.epoch
        return message

    def take(self, message: pb.ClusterView) -> None:
        if message.version <= self._view.version:
            return
        self._view = view_from_wire(message)
        self._on_view(self._view)


class HostLink(ControlLink):
    """What a host holds: tells what it is and holds, and is told what to hold.

    `on_order` is called on a thread of the link and must not wait for loading: the link would miss what follows; so is
    `on_cut`, with the seconds for which a drill wants rows to stay unanswered.
    """

    def __init__(
        self,
        *,
        resolve: Callable[[], str],
        report: Callable[[], HostReport],
        on_order: Callable[[HostOrder], None],
        on_cut: Callable[[float], None] = lambda _seconds: None,
        tls: Identity | None = None,
    ) -> None:
        self._make_report = report
        self._on_order = on_order
        self._on_cut = on_cut
        super().__init__("host", resolve, tls)

    def open(self, stub: Any, reports: Iterator[pb.HostReport]) -> Any:
        return stub.AttendHost(reports)

    def report(self) -> pb.HostReport:
        return host_report_to_wire(self._make_report())

    def take(self, message: pb.HostOrder) -> None:
        if message.cut_ms:
            self._on_cut(message.cut_ms / 1000)
        order = order_from_wire(message)
        if order is not None:
            self._on_order(order)


def fetch_status(address: str, timeout_s: float = 5.0, tls: Identity | None = None) -> ClusterStatus:
    """All that the controller at `address` knows. Raises ControllerUnreachable."""
    return status_from_wire(_ask(address, "Status", pb.StatusRequest(), timeout_s, tls))


def ask_drain(address: str, timeout_s: float = 5.0, tls: Identity | None = None) -> None:
    """Tell the whole cluster to take no new requests. Raises ControllerUnreachable."""
    _ask(address, "Drain", pb.DrainRequest(), timeout_s, tls)


def ask_cut(address: str, host: str, seconds: float, timeout_s: float = 5.0, tls: Identity | None = None) -> None:
    """Take the rows of `host` off the network for a while, as a drill. Raises ControllerUnreachable."""
    _ask(address, "Cut", pb.CutRequest(host=host, ms=round(seconds * 1000)), timeout_s, tls)


def ask_plan(
    address: str,
    *,
    apply: bool,
    load: Mapping[ExpertKey, float] | None = None,
    timeout_s: float = 30.0,
    tls: Identity | None = None,
) -> tuple[str, str]:
    """What would be planned now, or is planned and applied: for people, and as JSON. `load` are rows per second; None:
    what is measured. Raises InvalidInput and ControllerUnreachable."""
    request = pb.PlanRequest(apply=apply, load=rates_to_wire(load or {}))
    response = _ask(address, "Plan", request, timeout_s, tls)
    raise_refusal(response.refusal)
    return response.text, response.json


def ask_move(
    address: str, key: ExpertKey, to: str, timeout_s: float = 5.0, tls: Identity | None = None
) -> tuple[int, int]:
    """Move an expert to host `to`; returns how many replicas are to be loaded, and the epoch of now. This and the next
    ones raise InvalidInput and ControllerUnreachable."""
    move = pb.PlaceRequest.Move(layer=key[0], expert=key[1], to=to)
    return _place(address, pb.PlaceRequest(move=move), timeout_s, tls)


def ask_host_drain(address: str, host: str, timeout_s: float = 5.0, tls: Identity | None = None) -> tuple[int, int]:
    """Empty a host and end its process."""
    return _place(address, pb.PlaceRequest(drain_host=host), timeout_s, tls)


def ask_hosts(address: str, number: int, timeout_s: float = 5.0, tls: Identity | None = None) -> tuple[int, int]:
    """Let there be so many hosts: some are added, or drained and ended."""
    return _place(address, pb.PlaceRequest(num_hosts=number), timeout_s, tls)


def ask_target(
    address: str, replicas: Replicas, timeout_s: float = 30.0, tls: Identity | None = None
) -> tuple[int, int]:
    """Bring every expert to the hosts that `replicas` names."""
    return _place(address, pb.PlaceRequest(placement=replicas_to_wire(replicas)), timeout_s, tls)


def ask_rollback(
    address: str, epoch: int | None, timeout_s: float = 5.0, tls: Identity | None = None
) -> tuple[int, int]:
    """Go back to where experts were meant to be under `epoch`; None: before the last plan."""
    return _place(address, pb.PlaceRequest(rollback=pb.PlaceRequest.Rollback(epoch=epoch)), timeout_s, tls)


def fetch_history(address: str, timeout_s: float = 5.0, tls: Identity | None = None) -> list[AppliedPlan]:
    """The plans that were applied, the last one last. Raises ControllerUnreachable."""
    response = _ask(address, "History", pb.HistoryRequest(), timeout_s, tls)
    return [plan_from_wire(plan) for plan in response.plans]


def fetch_rows(
    address: str, timeout_s: float = 5.0, tls: Identity | None = None
) -> tuple[list[CountedRows], frozenset[ExpertKey]]:
    """The rows that hosts have counted, and every expert there is. Raises ControllerUnreachable."""
    response = _ask(address, "Rows", pb.RowsRequest(), timeout_s, tls)
    return [counted_from_wire(counted) for counted in response.hosts], keys_from_wire(response.experts)


def _place(address: str, request: pb.PlaceRequest, timeout_s: float, tls: Identity | None) -> tuple[int, int]:
    response = _ask(address, "Place", request, timeout_s, tls)
    raise_refusal(response.refusal)
    return response.loads, response.epoch


def ask_shutdown(address: str, timeout_s: float = 5.0, tls: Identity | None = None) -> None:
    """End all hosts and the controller, for good. Raises ControllerUnreachable."""
    _ask(address, "Shutdown", pb.ShutdownRequest(), timeout_s, tls)


def _ask(address: str, method: str, request: Any, timeout_s: float, tls: Identity | None) -> Any:
    with open_channel(address, client_options(MAX_MESSAGE_BYTES), tls) as channel:
        try:
            return getattr(ControlServiceStub(channel), method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise ControllerUnreachable(address, _problem(error, tls)) from None


def _problem(error: grpc.RpcError, tls: Identity | None) -> str:
    if not isinstance(error, grpc.Call):
        return "no answer"
    return explain(f"{error.code().name}: {error.details()}", tls)


def _until_none(outbox: queue.SimpleQueue[Any]) -> Iterator[Any]:
    while (message := outbox.get()) is not None:
        yield message
