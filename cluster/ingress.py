"""The process of one ingress: prompts, the HTTP app and its listener, streams to routers, and what it tells the
controller.

Knows nothing of Ray. All routers together are one backend to the app.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from cluster.config import ServeSettings
from cluster.image_rules import image_rules
from cluster.metrics.ingress import IngressNumbers, ingress_families
from cluster.metrics.page import MetricsPage
from cluster.topology import Role, max_connections, metrics_ports
from experts.config import load_config
from experts.errors import RouterLost
from experts.grpc_control import MemberLink
from experts.model_files import read_json
from experts.placement import ClusterView
from experts.reports import MemberKind, MemberReport
from experts.tls import Identity
from router.allocator import return_large_blocks
from router.api.backend import EventStream
from router.api.defaults import ServingDefaults
from router.api.http import HttpOptions, build_app
from router.api.http_listener import HttpListener
from router.engine.images import ImageInput
from router.engine.request import SamplingParams
from router.grpc_client import RouterPool
from router.histogram import Histogram
from router.prompt.chat import ChatTemplate
from router.prompt.images.vision import Vision
from router.prompt.stop_ids import GENERATION_FILE, default_stop_ids
from router.prompt.tokenizer import Tokenizer
from router.resume import ResumePolicy

log = logging.getLogger(__name__)

FINISH_S = 20.0
GENERATIONS = "/completions"
"""How the paths end whose answers take time: those of chats, too."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class IngressProcess:
    """An ingress with all its parts. `http` is the URL that clients reach it by.

    Constructing reads the tokenizer. Raises CheckpointError. Images are decoded in processes of its own, which end
    with it.
    """

    def __init__(
        self,
        settings: ServeSettings,
        *,
        name: str,
        node: str,
        bind: str,
        http: str,
        resolve: Callable[[], str],
        version: str = "",
    ) -> None:
        return_large_blocks()
        self.name = name
        identity = settings.identity()
        self.backend = ClusterBackend(settings, identity)
        self.link = MemberLink(resolve=resolve, report=self.report, on_view=self.backend.use, tls=identity)
        tokenizer = Tokenizer.from_folder(settings.model_dir)
        self.vision = Vision.from_folder(settings.model_dir, self.backend.config, tokenizer.special_ids)
        self.app = CountingApp(_http_app(settings, self.backend, tokenizer, self.vision, version))
        self.listener = HttpListener(
            self.app,
            host=settings.host,
            port=settings.port,
            max_connections=max_connections(settings),
            grace_s=FINISH_S,
            on_end=self.backend.pool.aclose,
        )
        self.metrics = MetricsPage(
            lambda: ingress_families(self.app.numbers()), bind=bind, ports=metrics_ports(settings, Role.INGRESS)
        )
        self._node = node
        self._http = http

    def start(self) -> None:
        """Begin to answer clients and to follow the cluster view. Raises InvalidInput when the port is taken."""
        self.listener.start()
        self.link.start()

    def report(self) -> MemberReport:
        """How this ingress is now, for the controller."""
        return MemberReport(
            kind=MemberKind.INGRESS,
            name=self.name,
            node=self._node,
            pid=os.getpid(),
            state="ready" if self.backend.ready() else "waiting",
            running=self.app.numbers().active,
            metrics_address=self.metrics.address,
            http=self._http,
        )

    def stop(self) -> None:
        """End every part. Requests in progress may finish within `FINISH_S`; the rest ends with an error that is safe
        to retry."""
        self.listener.stop()
        self.link.close()
        self.metrics.close()
        if self.vision is not None:
            self.vision.loader.close()


class ClusterBackend:
    """All routers of the cluster view as one. The view is set from the control link's thread."""

    def __init__(self, settings: ServeSettings, identity: Identity | None = None) -> None:
        self.config = load_config(settings.model_dir)
        hosted = settings.transport == "grpc"
        self.eos_ids = default_stop_ids(settings.model_dir, self.config.eos_token_ids)
        self.pool = RouterPool(
            policy=ResumePolicy(eos_ids=self.eos_ids), image_rules=image_rules(self.config), tls=identity
        )
        self._num_experts = len(self.config.moe_layers) * self.config.num_experts if hosted else 0
        self._view = ClusterView()

    def use(self, view: ClusterView) -> None:
        """Go by `view` from now on."""
        self.pool.connect(view.routers, draining=view.draining)
        # Last, so that `ready` speaks of a view that is in use.
        self._view = view

    def submit(
        self,
        *,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        deadline: float,
        images: Sequence[ImageInput] = (),
        priority: int = 0,
        cache_salt: str = "",
    ) -> EventStream:
        if self._view.draining:
            raise RouterLost("the cluster is shutting down")
        return self.pool.submit(
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampling=sampling,
            deadline=deadline,
            images=images,
            priority=priority,
            cache_salt=cache_salt,
        )

    def ready(self) -> bool:
        view = self._view
        routers_ready = any(router.state == "ready" for router in view.routers.values())
        return routers_ready and not view.draining and len(view.placement.replicas) >= self._num_experts

    def max_model_len(self) -> int:
        """The least of all routers', so that every one of them can take over a request from any other."""
        told = (router.max_model_len for router in self._view.routers.values())
        return min((length for length in told if length), default=0)


class CountingApp:
    """An ASGI app that counts what another one answers."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._responses: Counter[int] = Counter()
        self._active = 0
        self._generations = Histogram()

    def numbers(self) -> IngressNumbers:
        return IngressNumbers(responses=dict(self._responses), active=self._active, generations=self._generations)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._responses[status] += 1
            await send(message)

        self._active += 1
        began = time.monotonic()
        try:
            await self._app(scope, receive, counted)
        finally:
            self._active -= 1
            if status == 200 and scope.get("path", "").endswith(GENERATIONS):
                self._generations.add(time.monotonic() - began)


def _http_app(
    settings: ServeSettings, backend: ClusterBackend, tokenizer: Tokenizer, vision: Vision | None, version: str
) -> Callable[[Message, Receive, Send], Awaitable[None]]:
    model_dir = settings.model_dir
    defaults = ServingDefaults.from_generation_config(read_json(model_dir / GENERATION_FILE), backend.eos_ids)
    for field, problem in defaults.unfollowed:
        log.warning("%s: %s %s", GENERATION_FILE, field, problem)
    template = ChatTemplate.from_folder(model_dir, tokenizer)
    if template.is_built_in:
        log.warning("the checkpoint has no chat template: chats are written in Llama 4's own format")
    return build_app(
        served_names=[settings.model_name],
        tokenizer=tokenizer,
        template=template,
        backend=backend,
        defaults=defaults,
        vision=vision,
        version=version,
        options=HttpOptions(request_timeout_s=settings.request_timeout_s),
    )
