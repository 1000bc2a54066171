"""The names that Ray knows our actors by, and how a process finds the controller by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
import ray.util
from ray.actor import ActorHandle
from ray.exceptions import RayError

from cluster.config import ServeSettings
from experts.errors import ControllerUnreachable

NAMESPACE = "herd"
ASK_TIMEOUT_S = 5.0


def controller_name(settings: ServeSettings) -> str:
    return f"{settings.name}-controller"


def host_actor_name(settings: ServeSettings, host: str) -> str:
    return f"{settings.name}-{host}"


def node_address(settings: ServeSettings) -> str:
    """Where this process listens: the address of its node, unless the settings say otherwise."""
    return settings.node_address or str(ray.util.get_node_ip_address())


def call(method: Any, timeout_s: float) -> Any:
    """Call a method of an actor and wait for its result. Raises RayError."""
    return ray.get(method.remote(), timeout=timeout_s)


class ControllerFinder:
    """Gives the controller's address of now.

    Every other time it gives the last one known without asking, because Ray may be away while the controller is not.
    `start` makes a controller where there is none.
    """

    def __init__(self, settings: ServeSettings, start: Callable[[], ActorHandle[Any]] | None = None) -> None:
        self._name = controller_name(settings)
        self._start = start
        self._last = ""
        self._gave_last = True

    def __call__(self) -> str:
        """Raises ControllerUnreachable when Ray does not know or does not answer in time."""
        self._gave_last = not self._gave_last
        if self._last and self._gave_last:
            return self._last
        try:
            self._last = str(call(self._controller().address, ASK_TIMEOUT_S))
        except RayError as error:
            raise ControllerUnreachable(self._last, f"Ray: {type(error).__name__}") from None
        return self._last

    def _controller(self) -> ActorHandle[Any]:
        try:
            return ray.get_actor(self._name, namespace=NAMESPACE)
        except ValueError:
            if self._start is None:
                raise ControllerUnreachable("", "there is no controller") from None
            return self._start()
