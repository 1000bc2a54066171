"""A Ray that does not start is one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import parse_settings
from cluster.on_ray import own_ray
from cluster.on_ray.own_ray import JoinedRay, OwnRay, RayFailed
from experts.errors import InvalidInput


@pytest.fixture
def slow_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray as it is where it cannot start in time, and nothing of this process changed by asking it."""

    def init(**_options: Any) -> None:
        raise Exception("The current node timed out during startup.\nmore")

    for name in (
        "RAY_USAGE_STATS_ENABLED",
        "RAY_gcs_rpc_server_reconnect_timeout_s",
        "RAY_worker_niceness",
        "PYTHONPATH",
    ):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(own_ray, "PARENT", tmp_path)
    monkeypatch.setattr(own_ray, "adopt_orphans", lambda: None)
    monkeypatch.setattr(own_ray.ray, "init", init)


@pytest.mark.usefixtures("slow_ray")
def test_a_ray_that_starts_too_slowly_is_named() -> None:
    with pytest.raises(RayFailed, match=r"^Ray did not start: The current node timed out during startup\.$"):
        OwnRay().start()


@pytest.mark.usefixtures("slow_ray")
def test_a_ray_that_cannot_be_joined_is_named() -> None:
    settings = parse_settings({"model_dir": "x", "ray_address": "127.0.0.1:1"})
    with pytest.raises(InvalidInput, match=r"^ray-address: must be a Ray cluster: The current node timed out"):
        JoinedRay(settings).start()


def test_a_ray_lives_while_its_node_does_and_heals_while_its_head_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    living = {11: "/ray/gcs_server", 12: "/ray/raylet", 13: "python"}
    # Whoever else runs a Ray on this machine is not among the living here, and shall keep its folder.
    monkeypatch.setattr(own_ray, "PARENT", tmp_path)
    monkeypatch.setattr(own_ray, "descendants", lambda _pid: list(living))
    monkeypatch.setattr(own_ray, "command", lambda pid: living[pid])
    monkeypatch.setattr(own_ray, "is_alive", lambda pid: pid in living)
    monkeypatch.setattr(own_ray, "adopt_orphans", lambda: None)
    monkeypatch.setattr(own_ray.ray, "init", lambda **_options: None)
    for name in (
        "RAY_USAGE_STATS_ENABLED",
        "RAY_gcs_rpc_server_reconnect_timeout_s",
        "RAY_worker_niceness",
        "PYTHONPATH",
    ):
        monkeypatch.setenv(name, "0")
    mine = OwnRay()
    mine.start()
    assert mine.is_alive() and mine.has_head()
    del living[11]
    assert mine.is_alive() and not mine.has_head()
    del living[12]
    assert not mine.is_alive() and not mine.has_head()


@pytest.mark.usefixtures("slow_ray")
def test_only_folders_that_nobody_holds_are_tidied_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_ray, "is_alive", lambda _pid: False)
    held, left = OwnRay(), own_ray.PARENT / "herd-ray-12-abc"
    left.mkdir()
    OwnRay()
    assert held.folder.exists() and not left.exists()
