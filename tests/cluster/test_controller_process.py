"""The controller's process: its files, its port over its lives, and what other settings make of its journal."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import ServeSettings
from cluster.controller_process import ControllerProcess, http_url, plan_target
from cluster.run_file import read_run_files
from cluster.tiny import make_tiny
from experts.errors import CheckpointError, InvalidInput
from experts.grpc_control import fetch_status


class NoExecutor:
    """Starts nothing."""

    def ensure_host(self, name: str) -> None: ...

    def end_host(self, name: str) -> None: ...

    def ask_room(self, num_hosts: int) -> None: ...

    def leave(self, hosts: Iterable[str]) -> None: ...


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny("maverick", folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path, model_dir: Path) -> ServeSettings:
    return ServeSettings(model_dir=model_dir, hosts=3, replicas=2, state_dir=str(tmp_path / "state"), port=8123)


def live(settings: ServeSettings) -> tuple[ControllerProcess, str]:
    process = ControllerProcess(
        settings, node="127.0.0.1", bind="127.0.0.1", life_name="session", executor=NoExecutor()
    )
    return process, process.start()


def test_commands_find_it_and_nothing_is_left_at_the_end(settings: ServeSettings) -> None:
    process, address = live(settings)
    folder = Path(settings.state_dir)
    found = list(read_run_files((folder,)))
    assert [(file.control, file.http) for file in found] == [(address, "http://127.0.0.1:8123")]
    status = fetch_status(address)
    assert status.replicas_wanted == 2 * len(plan_target(settings))
    assert [host.name for host in status.hosts] == ["host-0", "host-1", "host-2"]
    assert status.controller.metrics_address
    process.stop()
    assert len(list(folder.iterdir())) == 2, "run file and journal outlive a life"
    process.remove_files()
    assert list(folder.iterdir()) == []


def test_the_next_life_comes_back_on_the_same_port(settings: ServeSettings) -> None:
    first, address = live(settings)
    first.stop()
    second, again = live(settings)
    assert again == address
    assert fetch_status(again).controller.term == 2
    second.stop()


def test_other_settings_make_another_target_above_the_old_numbers(settings: ServeSettings) -> None:
    first, _ = live(settings)
    first.stop()
    second, again = live(replace(settings, hosts=2))
    status = fetch_status(again)
    assert [host.name for host in status.hosts] == ["host-0", "host-1"]
    assert status.controller.term == 2
    second.stop()


def test_a_model_folder_that_is_none_is_named(settings: ServeSettings, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        live(replace(settings, model_dir=tmp_path))


def test_a_wanted_port_that_is_taken_is_named(settings: ServeSettings, tmp_path: Path) -> None:
    process, address = live(settings)
    taken = int(address.rpartition(":")[2])
    with pytest.raises(InvalidInput) as caught:
        live(replace(settings, control_port=taken, state_dir=str(tmp_path / "other")))
    assert caught.value.field == "control-port"
    process.stop()


def test_urls_name_an_address_that_can_be_reached() -> None:
    assert http_url(ServeSettings(model_dir=Path("/m"), host="10.0.0.7", port=80)) == "http://10.0.0.7:80"
    assert http_url(ServeSettings(model_dir=Path("/m"), host="0.0.0.0"), "10.0.0.9") == "http://10.0.0.9:8000"
