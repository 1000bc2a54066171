"""The application on a Ray that no `herd serve` watches, as `serve deploy` makes it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from serving import free_port, until

from cluster.tiny import make_tiny

pytestmark = pytest.mark.cluster

DEPLOY_AND_WAIT = """
import json, sys
from pathlib import Path
from cluster.console import output_to

args = json.loads(sys.argv[1])
with output_to(Path(sys.argv[2])) as (out, _):
    from ray import serve
    from cluster.on_ray.app import build
    from cluster.on_ray.own_ray import OwnRay

    own_ray = OwnRay()
    own_ray.start()
    serve.start(http_options={"host": args["host"], "port": args["port"]})
    serve.run(build(args), name="herd")
    print("deployed", file=out, flush=True)
    sys.stdin.readline()
    serve.delete("herd")
    serve.shutdown()
    own_ray.stop()
    print("ended", file=out, flush=True)
"""


class Deployed:
    """An application that runs, and how to look at it."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, state_dir: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.state_dir = state_dir

    def status(self) -> dict[str, list[dict[str, object]]]:
        control = json.loads(next(self.state_dir.glob("*.json")).read_text())["control"]
        command = [sys.executable, "-m", "cluster", "status", "--json", "--control", control]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def pids(self) -> set[int]:
        status = self.status()
        found = [entry["pid"] for kind in ("ingress", "routers", "hosts") for entry in status.get(kind, [])]
        return {*found, status["controller"]["pid"]} if len(found) == 5 and all(found) else set()

    def slots(self) -> dict[str, int]:
        return {host["name"]: host["slots"] for host in self.status().get("hosts", [])}

    def answer(self) -> str | None:
        body = {"model": "tiny-scout", "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        try:
            response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        except httpx.HTTPError:
            return None
        return response.json()["choices"][0]["text"] if response.status_code == 200 else None


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("deployed")
    make_tiny("scout", folder / "tiny-scout")
    args = {
        "model_dir": str(folder / "tiny-scout"),
        "hosts": 2,
        "replicas": 2,
        "host": "127.0.0.1",
        "port": free_port(),
        "kv_memory": "64MiB",
        "node_address": "127.0.0.1",
        "state_dir": str(folder / "state"),
    }
    with subprocess.Popen(
        [sys.executable, "-c", DEPLOY_AND_WAIT, json.dumps(args), str(folder / "log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "deployed\n"
        yield Deployed(process, args["port"], folder / "state")
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ended\n"


def test_the_application_starts_controller_and_hosts_by_itself(deployed: Deployed) -> None:
    until("an answer", deployed.answer)
    until("two replicas of 48 experts on two hosts", lambda: deployed.slots() == {"host-0": 48, "host-1": 48})
    status = deployed.status()
    assert status["ingress"][0]["http"] == deployed.url


def test_everything_killed_at_once_comes_back(deployed: Deployed) -> None:
    before = until("an answer", deployed.answer)
    pids = until("all processes are known", deployed.pids)
    assert len(pids) == 6
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    again: Callable[[], bool] = lambda: bool(deployed.pids()) and not deployed.pids() & pids  # noqa: E731
    until("all processes are others", again, timeout_s=120)
    assert until("an answer again", deployed.answer, timeout_s=120) == before
