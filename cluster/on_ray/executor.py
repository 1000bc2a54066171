"""What the controller wants of the world, done through Ray: start host actors, end everything."""

from __future__ import annotations

from collections.abc import Callable

import ray

from cluster.config import ServeSettings
from cluster.on_ray.find import NAMESPACE, host_actor_name
from cluster.on_ray.host_actor import HostActor
from cluster.topology import Role, needs


class RayExecutor:
    """Carries out the controller's effects. `end` ends the controller's own process, for good."""

    def __init__(self, settings: ServeSettings, end: Callable[[], None]) -> None:
        self._settings = settings
        self._end = end

    def ensure_host(self, name: str) -> None:
        """Make the actor of host `name` unless there is one, alive or being restarted by Ray."""
        wants = needs(self._settings, Role.HOST)
        ray.remote(HostActor).options(
            name=host_actor_name(self._settings, name),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=0,
            num_cpus=wants.num_cpus,
            num_gpus=wants.num_gpus,
            scheduling_strategy="SPREAD",
        ).remote(self._settings, name)

    def leave(self) -> None:
        """End all hosts, then this process."""
        for name in self._settings.host_names:
            try:
                actor = ray.get_actor(host_actor_name(self._settings, name), namespace=NAMESPACE)
            except ValueError:
                continue
            ray.kill(actor, no_restart=True)
        self._end()
