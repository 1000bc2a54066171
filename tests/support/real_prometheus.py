"""Debian's `prometheus` and `promtool`, where they are installed; tests that need them skip elsewhere and say so."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving import free_port, until

WHY = "is not installed (apt-get install prometheus)"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason=f"promtool {WHY}")
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None, reason=f"prometheus {WHY}"
)
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def promtool(*arguments: str, cwd: Path | None = None) -> str:
    """What it prints; a failure with that when it finds fault."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=cwd)
    assert done.returncode == 0, f"promtool {' '.join(arguments)}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        with _direct.open(f"{self.url}{path}{query}", timeout=30) as response:
            return json.loads(response.read())

    def query(self, expression: str) -> list[Any]:
        """The result of an instant query."""
        answer = self.get("/api/v1/query", query=expression)
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError), _direct.open(f"{self.url}/-/ready", timeout=5) as response:
            return response.status == 200
        return False


@contextlib.contextmanager
def running_prometheus(folder: Path, config: str, *flags: str) -> Iterator[Prometheus]:
    """`prometheus` on loopback with `config`, its data under `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "prometheus.yml").write_text(config)
    port = free_port()
    command = [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn", *flags,
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    server = Prometheus(f"http://127.0.0.1:{port}")
    try:
        until(
            "prometheus is ready",
            lambda: server.is_ready() or process.poll() is not None,
            120.0,
        )
        assert process.poll() is None, (folder / "log").read_text()
        yield server
    finally:
        process.terminate()
        process.wait(timeout=60)
