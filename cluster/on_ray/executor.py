"""What the controller wants of the world, done through Ray: start host actors, end everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import ray
from ray.autoscaler.sdk import request_resources

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

    def end_host(self, name: str) -> None:
        """End the actor of host `name` for good, if there is one, alive or waiting for room."""
        try:
            actor = ray.get_actor(host_actor_name(self._settings, name), namespace=NAMESPACE)
        except ValueError:
            return
        ray.kill(actor, no_restart=True)

    def ask_room(self, num_hosts: int) -> None:
        """Ask Ray's autoscaler for a processor, and a GPU where hosts compute on one, for every host. It replaces what
        was asked before; a Ray without an autoscaler, such as one of our own, takes no notice."""
        if self._settings.ray_address is None:
            return
        wants = needs(self._settings, Role.HOST)
        bundle = {"CPU": max(1.0, wants.num_cpus)} | ({"GPU": wants.num_gpus} if wants.num_gpus else {})
        request_resources(bundles=[bundle] * num_hosts)

    def leave(self, hosts: Iterable[str]) -> None:
        """End all hosts, those of the start and those that were added, then this process."""
        for name in {*self._settings.host_names, *hosts}:
            self.end_host(name)
        self._end()
