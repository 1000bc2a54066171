"""Loads and evicts the experts of one host as the controller's newest order says. Knows nothing of the controller."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from experts.errors import HerdError
from experts.ffn import ExpertWeights
from experts.host import ExpertHost
from experts.placement import ExpertKey
from experts.reports import HostOrder, Peer
from experts.threads import Threads

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0

log = logging.getLogger(__name__)


Fetch = Callable[[Peer, ExpertKey, float], ExpertWeights]
"""An expert from another host, at so many bytes per second at most."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of order number `order`: what could not be loaded, and why in words; both empty when all is held."""

    order: int = 0
    failed: frozenset[ExpertKey] = frozenset()
    problem: str = ""


class OrderFollower:
    """A thread that does what it is told by `take`. `on_progress` is called from it after every try, and `leave` once,
    as the last thing, when the host is told to retire."""

    def __init__(
        self,
        host: ExpertHost,
        *,
        on_progress: Callable[[], None],
        leave: Callable[[], None],
        fetch: Fetch | None = None,
        threads: Threads = threading,
    ) -> None:
        """`fetch` gets an expert from another host, and raises HerdError where that is not possible."""
        self.result = Result()
        self._host = host
        self._fetch = fetch
        self._on_progress = on_progress
        self._leave = leave
        self._order: HostOrder | None = None
        self._ordered = threads.Condition()
        self._stopping = False
        self._thread = threads.Thread(target=self._work, name="host-loader", daemon=True)

    @property
    def problem(self) -> str:
        """Why an ordered expert is not held; empty while loading goes well."""
        return self.result.problem

    def start(self) -> None:
        self._thread.start()

    def take(self, order: HostOrder) -> None:
        """Follow `order` from now on; from any thread."""
        with self._ordered:
            self._order = order
            self._ordered.notify_all()

    def look(self) -> None:
        """What the host holds has changed: load what is missing of the order; from any thread."""
        with self._ordered:
            self._ordered.notify_all()

    def stop(self) -> None:
        """Load nothing more after the expert that is being loaded."""
        with self._ordered:
            self._stopping = True
            self._ordered.notify_all()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout=timeout_s)

    def _work(self) -> None:
        """Follow the newest order; what cannot be loaded is tried again, ever more slowly."""
        pause = FIRST_RETRY_S
        while not self._stopping:
            with self._ordered:
                order = self._order
                if order is None or self._is_done(order):
                    if not self._stopping:
                        self._ordered.wait()
                    pause = FIRST_RETRY_S
                    continue
            if order.retire:
                log.warning("host %s is not wanted any more", self._host.name)
                self._leave()
                return
            self._follow(order)
            self._on_progress()
            if self.result.failed:
                with self._ordered:
                    if self._order is order:
                        self._ordered.wait(pause)
                pause = min(2 * pause, LAST_RETRY_S)

    def _is_done(self, order: HostOrder) -> bool:
        return self.result == Result(order=order.number) and self._host.held() == order.target and not order.retire

    def _follow(self, order: HostOrder) -> None:
        """Load, then evict; stop as soon as there is a newer order."""
        failures: dict[ExpertKey, HerdError] = {}
        for key in sorted(order.target - self._host.held()):
            if self._order is not order or self._stopping:
                return
            try:
                self._load(order, key)
            except HerdError as error:
                failures[key] = error
        for key in self._host.held() - order.target:
            self._host.evict(key)
        self.result = Result(order=order.number, failed=frozenset(failures), problem=_summary(failures))
        if failures:
            log.error("host %s: %s", self._host.name, self.problem)

    def _load(self, order: HostOrder, key: ExpertKey) -> None:
        """From the host that has it, if there is one; from disk where that fails. Raises HerdError."""
        peer = order.peers.get(key)
        if peer is not None and self._fetch is not None:
            try:
                self._host.put(key, self._fetch(peer, key, order.bytes_per_s))
                return
            except HerdError as error:
                log.warning(
                    "host %s: expert %d of layer %d comes from disk: %s", self._host.name, key[1], key[0], error
                )
        self._host.load(key)


def _summary(failures: dict[ExpertKey, HerdError]) -> str:
    if not failures:
        return ""
    (layer, expert), error = next(iter(failures.items()))
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return f"expert {expert} of layer {layer} cannot be loaded: {error}{more}"
