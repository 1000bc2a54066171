"""The process of an expert host: it loads and evicts as ordered, says what is wrong, and leaves when nobody cares."""

import json
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from cluster.config import ServeSettings
from cluster.control.grpc_server import ControlServer, Listener
from cluster.control.journal import JournalFile
from cluster.control.state import Journal
from cluster.controller_process import plan_target
from cluster.host_process import HostProcess, tell_failure
from cluster.tiny import make_tiny
from experts.errors import ControllerUnreachable, InvalidInput
from experts.grpc_control import ask_move, ask_rollback, fetch_history, fetch_status
from experts.placement import HostInfo

PATIENCE_S = 60.0


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.02)


class NoExecutor:
    """Starts nothing: the tests do."""

    def ensure_host(self, name: str) -> None: ...

    def end_host(self, name: str) -> None: ...

    def ask_room(self, num_hosts: int) -> None: ...

    def leave(self, hosts: Iterable[str]) -> None: ...


class World:
    """A controller that wants two hosts, and a folder with a model."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        self.settings = ServeSettings(model_dir=model_dir, hosts=2)
        self.target = plan_target(self.settings)
        self.server = ControlServer(
            name="herd",
            journal=JournalFile(folder / "herd.journal"),
            fresh=Journal(digest="d", target=self.target),
            hosts=self.settings.host_names,
            executor=NoExecutor(),
            listener=Listener(),
        )
        self.address = self.server.start()
        self.left = threading.Event()
        self.processes: list[HostProcess] = []

    def host(self, name: str, resolve: Callable[[], str] | None = None, orphan_s: float = 60.0) -> HostProcess:
        process = HostProcess(
            self.settings,
            name=name,
            node="127.0.0.1",
            bind="127.0.0.1",
            resolve=resolve or (lambda: self.address),
            leave=self.left.set,
            orphan_s=orphan_s,
        )
        self.processes.append(process)
        process.start()
        return process

    def seen(self, name: str) -> HostInfo:
        return next(host for host in fetch_status(self.address).hosts if host.name == name)

    def close(self) -> None:
        for process in self.processes:
            process.stop()
        self.server.stop()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny("scout", folder)
    return folder


@pytest.fixture
def world(tmp_path: Path, model_dir: Path) -> Iterator[World]:
    # A copy of its own: some tests break it.
    world = World(tmp_path, Path(shutil.copytree(model_dir, tmp_path / "tiny")))
    yield world
    world.close()


def test_a_host_loads_what_it_is_ordered_to_and_tells(world: World) -> None:
    process = world.host("host-0")
    mine = {key for key, names in world.target.items() if "host-0" in names}
    until(lambda: world.seen("host-0").state == "ready", "all is loaded")
    assert process.host.held() == mine
    seen = world.seen("host-0")
    assert (seen.slots, seen.slots_target, seen.address) == (len(mine), len(mine), process.address)
    assert process.report().held_bytes > 0


def test_an_expert_moves_from_host_to_host_without_the_disk(world: World, model_dir: Path) -> None:
    first, second = world.host("host-0"), world.host("host-1")
    for name in ("host-0", "host-1"):
        until(lambda name=name: world.seen(name).state == "ready", "all is loaded")
    key = min(first.host.held())
    before = first.host.slot(key)
    for file in world.settings.model_dir.glob("*.safetensors"):
        file.unlink()
    loads, epoch = ask_move(world.address, key, "host-1")
    assert loads == 1
    until(lambda: key in second.host.held() and key not in first.host.held(), "it has moved")
    assert second.host.slot(key).checksum == before.checksum
    status = fetch_status(world.address)
    assert status.controller.epoch > epoch and not status.placement.given_up_total
    ask_rollback(world.address, None)
    until(lambda: key in first.host.held() and key not in second.host.held(), "it is back")
    assert [plan.is_undone for plan in fetch_history(world.address)] == [True, True]
    with pytest.raises(InvalidInput, match="must be one of host-0, host-1"):
        ask_move(world.address, key, "host-7")


def test_a_turned_bit_is_found_and_mended(world: World) -> None:
    process = world.host("host-0")
    until(lambda: world.seen("host-0").state == "ready", "all is loaded")
    key = max(process.host.held())
    slot = process.host.slot(key)
    slot.weights.down_HF.view(torch.uint8)[0, 0] ^= 4
    until(lambda: process.report().num_damaged == 1, "it is found")
    until(lambda: key in process.host.held(), "it is loaded anew")
    assert process.host.slot(key).checksum == slot.checksum and process.host.slot(key) is not slot


def test_two_lives_of_one_host_do_not_meet(world: World) -> None:
    world.host("host-0")
    until(lambda: world.seen("host-0").state == "ready", "the first is ready")
    second = world.host("host-0")
    assert world.left.wait(PATIENCE_S), "the older one is sent away"
    until(lambda: world.seen("host-0").address == second.address, "the newer one stays")


def test_an_expert_that_cannot_be_read_is_named_and_the_others_are_served(world: World) -> None:
    layer, expert = next(key for key, names in world.target.items() if "host-0" in names)
    name = f"language_model.model.layers.{layer}.feed_forward.experts.gate_up_proj"
    mend = misshape(world.settings.model_dir, name)
    process = world.host("host-0")

    def problems() -> tuple[str, ...]:
        return fetch_status(world.address).problems

    until(
        lambda: any(f"expert {expert} of layer {layer} cannot be loaded" in text for text in problems()), "it is told"
    )
    assert name in next(iter(problems()))
    assert process.host.held(), "other layers are served"
    mend()
    process.stop()
    world.processes.remove(process)
    world.host("host-0")
    until(lambda: world.seen("host-0").state == "ready" and not problems(), "all is well once it is mended")


def test_what_keeps_a_host_from_beginning_reaches_the_status(world: World) -> None:
    tell = threading.Thread(
        target=tell_failure,
        args=(ServeSettings(model_dir=Path("/m")), "host-1"),
        kwargs={"node": "n", "resolve": lambda: world.address, "problem": "no such folder", "for_s": 2.0},
    )
    tell.start()
    until(lambda: fetch_status(world.address).problems == ("host host-1: no such folder",), "it is told")
    tell.join()


def test_an_orphan_leaves(world: World) -> None:
    def nowhere() -> str:
        raise ControllerUnreachable("", "there is none")

    world.host("host-0", resolve=nowhere, orphan_s=0.5)
    assert world.left.wait(PATIENCE_S)


def test_a_host_with_a_controller_stays(world: World) -> None:
    world.host("host-0", orphan_s=3.5)
    until(lambda: world.seen("host-0").state == "ready", "it is ready")
    assert not world.left.wait(4.5)


def test_a_taken_port_range_is_an_error(world: World) -> None:
    process = world.host("host-0")
    port = process.server.port
    world.settings = ServeSettings(model_dir=world.settings.model_dir, hosts=1, host_ports=range(port, port + 1))
    with pytest.raises(InvalidInput):
        world.host("host-1")


def misshape(model_dir: Path, tensor: str) -> Callable[[], None]:
    """Give `tensor` another shape of as many numbers in its file's header; returns how to undo it."""
    for path in model_dir.glob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        if tensor in header:
            shape = header[tensor]["shape"]
            header[tensor]["shape"] = [shape[0], shape[2], shape[1]]
            changed = json.dumps(header, separators=(",", ":")).encode().ljust(length)
            assert len(changed) == length
            path.write_bytes(data[:8] + changed + data[8 + length :])
            return lambda: path.write_bytes(data) and None
    raise AssertionError(tensor)
