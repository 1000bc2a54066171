"""All drills against a running cluster: nothing fails, and every answer is that without faults. Times are not
judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Cluster, serving, state_env

from cluster.drill.faults import Kind
from cluster.tiny import make_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.soak]

TIMES = os.environ.get("DRILL_TIMES", "1")
"""Faults of each drill."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("models") / "tiny-scout"
    make_tiny("scout", folder)
    flags = ["--hosts", "4", "--replicas", "2", "--routers", "2", "--deterministic", "--kv-memory", "128MiB"]
    with serving(folder, tmp_path_factory.mktemp("state"), *flags) as cluster:
        yield cluster


@pytest.mark.parametrize("kind", [kind.value for kind in Kind])
def test_a_drill_costs_no_request_and_changes_no_answer(cluster: Cluster, kind: str, tmp_path: Path) -> None:
    report = tmp_path / "drill.json"
    command = [sys.executable, "-m", "cluster", "drill", kind, "--times", TIMES, "--json", str(report)]
    environment = {**os.environ, **state_env(cluster.state_dir)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300 * int(TIMES))
    assert report.exists(), done.stderr
    verdict: dict[str, Any] = json.loads(report.read_text())["drills"][0]
    print(done.stdout)
    assert (verdict["failed"], verdict["problems"]) == (0, [])
    assert verdict["equal"] == verdict["compared"] > 0
    assert verdict["faults"] == int(TIMES)
    assert done.returncode == (1 if verdict["broken"] else 0)
