"""The controller as a Ray actor, and how whoever needs it makes sure that there is one."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.config import ServeSettings
from cluster.controller_process import ControllerProcess
from cluster.on_ray.executor import RayExecutor
from cluster.on_ray.find import NAMESPACE, call, controller_name, node_address
from cluster.on_ray.host_actor import end_for_good
from cluster.topology import Role, needs
from experts.errors import ControllerUnreachable, HerdError

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 15.0
RETRY_AFTER_S = 2.0

log = logging.getLogger(__name__)


class ControllerActor:
    """The constructor does not fail: Ray gives up for good on an actor whose constructor raises."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._me = ray.get_runtime_context().current_actor
        self._executor = RayExecutor(settings, self._end)
        self._failure: HerdError | None = None
        self._process: ControllerProcess | None = None
        self._address = ""
        try:
            self._begin()
        except HerdError as error:
            log.exception("the controller cannot begin")
            self._failure = error
            if ray.get_runtime_context().was_current_actor_reconstructed:
                # Nobody is there to be told; a taken port may be free in a while.
                threading.Timer(RETRY_AFTER_S, os._exit, args=[1]).start()

    def address(self) -> str:
        """Where the controller listens. Raises the HerdError that kept it from beginning."""
        if self._failure is not None:
            raise self._failure
        return self._address

    def digest(self) -> str:
        """Of the settings that it was started with."""
        return self._settings.digest()

    def leave(self) -> None:
        """End the hosts and this actor, for good."""
        self._executor.leave(self._process.server.host_names() if self._process is not None else ())

    def _begin(self) -> None:
        node = node_address(self._settings)
        session = ray.get_runtime_context().get_session_name()
        self._process = ControllerProcess(
            self._settings, node=node, bind=node, life_name=session, executor=self._executor
        )
        self._address = self._process.start()

    def _end(self) -> None:
        if self._process is not None:
            self._process.remove_files()
        end_for_good(self._me)


def ensure_controller(settings: ServeSettings) -> Any:
    """The controller of `settings.name`, made if there is none; one of other settings is ended with its hosts first.

    Raises what keeps it from beginning (InvalidInput, CheckpointError), or ControllerUnreachable.
    """
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        actor = _controller(settings)
        try:
            if call(actor.digest, START_TIMEOUT_S) == settings.digest():
                call(actor.address, START_TIMEOUT_S)
                return actor
            log.warning("ending a controller that was started with other settings")
            actor.leave.remote()
            _wait_for_end(settings)
        except RayTaskError as error:
            ray.kill(actor, no_restart=True)
            if isinstance(error.cause, HerdError):
                raise error.cause from None
            raise
        except RayError as error:
            log.warning("the controller does not answer: %s", type(error).__name__)
            time.sleep(0.5)
    raise ControllerUnreachable("", f"Ray could not start it within {START_TIMEOUT_S:.0f} s")


def _controller(settings: ServeSettings) -> Any:
    wants = needs(settings, Role.CONTROLLER)
    actor: Any = (
        ray.remote(ControllerActor)
        .options(
            name=controller_name(settings),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=0,
            num_cpus=wants.num_cpus,
            num_gpus=wants.num_gpus,
            # A call that ends the actor must not wait for one that hangs.
            max_concurrency=4,
        )
        .remote(settings)
    )
    return actor


def _wait_for_end(settings: ServeSettings) -> None:
    end = time.monotonic() + END_TIMEOUT_S
    while time.monotonic() < end:
        try:
            ray.get_actor(controller_name(settings), namespace=NAMESPACE)
        except ValueError:
            return
        time.sleep(0.1)
