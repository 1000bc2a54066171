"""An expert host as a Ray actor: Ray places, starts and restarts it, and carries nothing else."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.config import ServeSettings
from cluster.on_ray.find import ControllerFinder, node_address
from experts.errors import HerdError
from experts.sudden_end import close_sockets_first

RETRY_AFTER_S = 5.0
KILL_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class HostActor:
    """The constructor returns at once and does not fail: Ray gives up for good on an actor whose constructor raises."""

    def __init__(self, settings: ServeSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._me = ray.get_runtime_context().current_actor
        threading.Thread(target=self._live, name="host-start", daemon=True).start()

    def ping(self) -> str:
        """The host's name; answers once the process is there."""
        return self._name

    def _live(self) -> None:
        from cluster.host_process import HostProcess, tell_failure

        close_sockets_first()
        node = node_address(self._settings)
        resolve = ControllerFinder(self._settings)
        try:
            self._process = HostProcess(
                self._settings,
                name=self._name,
                node=node,
                bind=node,
                resolve=resolve,
                leave=lambda: end_for_good(self._me),
            )
            self._process.start()
        except Exception as error:
            log.exception("host %s cannot begin", self._name)
            problem = str(error) if isinstance(error, HerdError) else f"{type(error).__name__}: see the host's log"
            tell_failure(self._settings, self._name, node=node, resolve=resolve, problem=problem, for_s=RETRY_AFTER_S)
            # Ray starts it again, and with luck the folder is mounted or the port is free by then.
            os._exit(1)


def end_for_good(actor: ActorHandle[Any]) -> None:
    """End the calling process, which is that of `actor`, so that Ray does not start it again."""
    try:
        ray.kill(actor, no_restart=True)
        time.sleep(KILL_TIMEOUT_S)
    finally:
        # Ray is away: leave all the same.
        os._exit(0)
