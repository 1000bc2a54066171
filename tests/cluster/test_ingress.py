"""What an ingress makes of the cluster view, and what it counts."""

import asyncio
import platform
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from cluster.config import ServeSettings
from cluster.controller_process import plan_target
from cluster.ingress import ClusterBackend, CountingApp
from cluster.tiny import make_tiny
from experts.errors import RouterLost
from experts.placement import ClusterView, Placement, RouterInfo
from router.engine.request import SamplingParams

ROUTERS = {
    "a": RouterInfo(name="a", address="127.0.0.1:1", max_model_len=4096),
    "b": RouterInfo(name="b", address="127.0.0.1:2", max_model_len=2048),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServeSettings:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny("scout", folder)
    return ServeSettings(model_dir=folder, hosts=2)


@pytest.fixture
def view(settings: ServeSettings) -> ClusterView:
    return ClusterView(version=1, placement=Placement(epoch=1, replicas=plan_target(settings)), routers=ROUTERS)


def backend(settings: ServeSettings, view: ClusterView) -> ClusterBackend:
    made = ClusterBackend(settings)
    made.use(view)
    return made


def test_ready_takes_a_router_and_every_expert(settings: ServeSettings, view: ClusterView) -> None:
    assert not ClusterBackend(settings).ready(), "no view yet"
    assert backend(settings, view).ready()
    assert not backend(settings, replace(view, routers={})).ready()
    stopping = {"a": replace(ROUTERS["a"], state="stopping")}
    assert not backend(settings, replace(view, routers=stopping)).ready()
    assert not backend(settings, replace(view, draining=True)).ready()
    partial = dict(list(view.placement.replicas.items())[1:])
    assert not backend(settings, replace(view, placement=Placement(epoch=2, replicas=partial))).ready()


def test_routers_that_compute_themselves_need_no_placement(settings: ServeSettings, view: ClusterView) -> None:
    local = replace(settings, transport="local")
    assert backend(local, replace(view, placement=Placement())).ready()


def test_the_context_is_what_every_router_can_take_over(settings: ServeSettings, view: ClusterView) -> None:
    assert backend(settings, view).max_model_len() == 2048
    untold = {**ROUTERS, "c": RouterInfo(name="c", address="127.0.0.1:3")}
    assert backend(settings, replace(view, routers=untold)).max_model_len() == 2048
    assert ClusterBackend(settings).max_model_len() == 0


def test_a_draining_cluster_takes_nothing_new(settings: ServeSettings, view: ClusterView) -> None:
    draining = backend(settings, replace(view, draining=True))
    with pytest.raises(RouterLost):
        draining.submit(request_id="r", prompt_ids=[1], sampling=SamplingParams(max_tokens=1), deadline=0.0)


INGRESS = """
import ctypes, sys
from pathlib import Path
from cluster.config import ServeSettings
from cluster.ingress import IngressProcess

class Numbers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "a b c d mapped f g h i j".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Numbers
settings = ServeSettings(model_dir=Path(sys.argv[1]), hosts=2)
process = IngressProcess(
    settings, name="i", node="127.0.0.1", bind="127.0.0.1", http="http://127.0.0.1:1", resolve=lambda: "127.0.0.1:1"
)
bytearray(30_000_000)
before = libc.mallinfo2().mapped
body = bytearray(20_000_000)
print(libc.mallinfo2().mapped - before >= 20_000_000)
process.metrics.close()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_an_ingress_gives_large_bodies_back(settings: ServeSettings) -> None:
    command = [sys.executable, "-c", INGRESS, str(settings.model_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.stdout.strip() == "True", ended.stderr


def test_responses_are_counted_whatever_becomes_of_them() -> None:
    async def app(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] == "http":
            assert counting.numbers().active == 1
            await send({"type": "http.response.start", "status": scope["status"]})
            if scope["status"] == 500:
                raise OSError("the client left")

    async def nothing(message: Any = None) -> None: ...

    counting = CountingApp(app)
    for status in (200, 200, 404):
        asyncio.run(counting({"type": "http", "status": status}, nothing, nothing))
    asyncio.run(counting({"type": "lifespan"}, nothing, nothing))
    with pytest.raises(OSError, match="left"):
        asyncio.run(counting({"type": "http", "status": 500}, nothing, nothing))
    assert counting.numbers().responses == {200: 2, 404: 1, 500: 1}
    assert counting.numbers().active == 0
    for path, status in (("/v1/chat/completions", 200), ("/v1/completions", 200), ("/v1/completions", 429), ("/", 200)):
        asyncio.run(counting({"type": "http", "path": path, "status": status}, nothing, nothing))
    assert sum(counting.numbers().generations.counts) == 2
