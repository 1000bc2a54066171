"""A cluster in this process, ready in a moment: controller, hosts, routers and ingress with all their listeners and
links, but no Ray that starts them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from compiled import Threads
from serving import START_S, FrontDoor, free_port, until

from cluster.config import ServeSettings
from cluster.controller_process import ControllerProcess, http_url
from cluster.host_process import HostProcess
from cluster.ingress import IngressProcess
from cluster.router_process import RouterProcess

HERE = "127.0.0.1"


class NoExecutor:
    """Starts nothing: whoever wants hosts makes them."""

    def ensure_host(self, name: str) -> None: ...

    def end_host(self, name: str) -> None: ...

    def ask_room(self, num_hosts: int) -> None: ...

    def leave(self, hosts: Iterable[str]) -> None: ...


@contextlib.contextmanager
def serving_here(model_dir: Path, state_dir: Path, **wanted: Any) -> Iterator[FrontDoor]:
    """The model behind HTTP, ready. `wanted` are fields of ServeSettings."""
    settings = ServeSettings(model_dir=model_dir, state_dir=str(state_dir), port=free_port(), ingresses=1, **wanted)
    with Threads(torch.get_num_threads()), contextlib.ExitStack() as stack:
        controller = ControllerProcess(settings, node=HERE, bind=HERE, life_name="test", executor=NoExecutor())
        stack.callback(controller.stop)
        address = controller.start()
        ingress = IngressProcess(
            settings, name="ingress", node=HERE, bind=HERE, http=http_url(settings), resolve=lambda: address
        )
        for process in (*_hosts(settings, address), *_routers(settings, address), ingress):
            stack.callback(process.stop)
            process.start()
        until("a router and every expert are there", ingress.backend.ready, START_S)
        yield FrontDoor(url=http_url(settings), model=settings.model_name)


def _hosts(settings: ServeSettings, address: str) -> list[HostProcess]:
    return [
        HostProcess(settings, name=name, node=HERE, bind=HERE, resolve=lambda: address, leave=lambda: None)
        for name in settings.host_names
    ]


def _routers(settings: ServeSettings, address: str) -> list[RouterProcess]:
    names = [f"router-{number}" for number in range(settings.routers)]
    return [RouterProcess(settings, name=name, node=HERE, bind=HERE, resolve=lambda: address) for name in names]
