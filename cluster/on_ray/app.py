"""The Serve application: ingresses and routers as two deployments. Serve starts, counts and health-checks them; what
they say to each other and to the controller goes over channels of their own.

`cluster.on_ray.app:build` is the import path for `serve deploy`.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from cluster.config import ServeSettings, parse_settings
from cluster.controller_process import http_url
from cluster.ingress import IngressProcess
from cluster.on_ray.controller_actor import ensure_controller
from cluster.on_ray.find import ControllerFinder, node_address
from cluster.topology import Role, needs
from cluster.version import herd_version
from experts.errors import RouterLost
from experts.sudden_end import close_sockets_first

HEALTH_EVERY_S = 1.0
HEALTH_TIMEOUT_S = 30.0
NUM_TRIES = 3
ROUTER_STOP_S = 10.0
INGRESS_STOP_S = 30.0


class Router:
    """One router. It is never called through Serve; the handle of it that the ingress gets only ties them together."""

    def __init__(self, settings: ServeSettings) -> None:
        # Imported where it is used: an ingress has no use for torch.
        from cluster.router_process import RouterProcess

        close_sockets_first()
        node = node_address(settings)
        finder = _finder(settings)
        self._process = RouterProcess(settings, name=_replica_name("router"), node=node, bind=node, resolve=finder)
        self._process.start()

    def check_health(self) -> None:
        """Raises when this replica is of no use any more, so that Serve replaces it."""
        if not self._process.alive:
            raise RouterLost("the engine of this router has ended")

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self._process.stop()


class Ingress:
    """One ingress. Clients connect to it, not to Serve. `routers` is not used: it makes Serve deploy them as one
    application."""

    def __init__(self, settings: ServeSettings, routers: Any) -> None:
        close_sockets_first()
        node = node_address(settings)
        self._process = IngressProcess(
            settings,
            name=_replica_name("ingress"),
            node=node,
            bind=node,
            http=http_url(settings, node),
            resolve=_finder(settings),
            version=herd_version(),
        )
        self._process.start()

    def check_health(self) -> None:
        """Raises when nobody is answered here any more, so that Serve replaces this replica."""
        if not self._process.listener.alive:
            raise RouterLost("the HTTP listener of this ingress has ended")

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self._process.stop()


def build(args: dict[str, Any]) -> Application:
    """The application for `args`, which are those of `cluster.config.ServeSettings`. Raises InvalidInput."""
    return build_app(parse_settings(args))


def build_app(settings: ServeSettings, ingress_node: str = "") -> Application:
    """The application for `settings`, not deployed. Ingresses go to the Ray node at `ingress_node`, if given."""
    router: Any = _deployment(Router).options(
        name="Router",
        num_replicas=settings.routers,
        ray_actor_options=_resources(settings, Role.ROUTER),
        max_constructor_retry_count=NUM_TRIES,
        health_check_period_s=HEALTH_EVERY_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=ROUTER_STOP_S,
    )
    ingress: Any = _deployment(Ingress).options(
        name="Ingress",
        num_replicas=settings.ingresses,
        ray_actor_options={**_resources(settings, Role.INGRESS), **_pinned(ingress_node)},
        max_constructor_retry_count=NUM_TRIES,
        health_check_period_s=HEALTH_EVERY_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=INGRESS_STOP_S,
    )
    app: Application = ingress.bind(settings, router.bind(settings))
    return app


def _deployment(cls: Any) -> Any:
    """Serve's decorator, whose own annotation forgets what it returns for a class."""
    return serve.deployment(cls)


def _finder(settings: ServeSettings) -> ControllerFinder:
    """The application starts the controller when nobody else did, and again should it ever be gone for good."""
    ensure_controller(settings)
    return ControllerFinder(settings, start=lambda: ensure_controller(settings))


def _replica_name(kind: str) -> str:
    return f"{kind}-{serve.get_replica_context().replica_id.unique_id}"


def _pinned(node: str) -> dict[str, Any]:
    """Ray gives every node a resource of its own name."""
    return {"resources": {f"node:{node}": 0.001}} if node else {}


def _resources(settings: ServeSettings, role: Role) -> dict[str, float]:
    wants = needs(settings, role)
    return {"num_cpus": wants.num_cpus, "num_gpus": wants.num_gpus}
