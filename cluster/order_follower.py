"""Loads and evicts the experts of one host as the controller's newest order says. Knows nothing of the controller."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from experts.errors import HerdError
from experts.host import ExpertHost
from experts.placement import ExpertKey
from experts.reports import HostOrder
from experts.threads import Threads

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0

log = logging.getLogger(__name__)


class OrderFollower:
    """A thread that does what it is told by `take`. `on_progress` is called from it after every try, and `leave` once,
    as the last thing, when the host is told to retire."""

    def __init__(
        self,
        host: ExpertHost,
        *,
        on_progress: Callable[[], None],
        leave: Callable[[], None],
        threads: Threads = threading,
    ) -> None:
        self.problem = ""
        """Why an ordered expert is not held; empty while loading goes well."""
        self._host = host
        self._on_progress = on_progress
        self._leave = leave
        self._order: HostOrder | None = None
        self._ordered = threads.Condition()
        self._stopping = False
        self._thread = threads.Thread(target=self._work, name="host-loader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self, order: HostOrder) -> None:
        """Follow `order` from now on; from any thread."""
        with self._ordered:
            self._order = order
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
                if order is None or (self._host.held() == order.target and not order.retire):
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
            if self.problem:
                with self._ordered:
                    self._ordered.wait(pause)
                pause = min(2 * pause, LAST_RETRY_S)

    def _follow(self, order: HostOrder) -> None:
        """Load, then evict; stop as soon as there is a newer order."""
        failures: dict[ExpertKey, HerdError] = {}
        for key in sorted(order.target - self._host.held()):
            if self._order is not order or self._stopping:
                return
            try:
                self._host.load(key)
            except HerdError as error:
                failures[key] = error
        for key in self._host.held() - order.target:
            self._host.evict(key)
        self.problem = _summary(failures)
        if failures:
            log.error("host %s: %s", self._host.name, self.problem)


def _summary(failures: dict[ExpertKey, HerdError]) -> str:
    if not failures:
        return ""
    (layer, expert), error = next(iter(failures.items()))
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return f"expert {expert} of layer {layer} cannot be loaded: {error}{more}"
