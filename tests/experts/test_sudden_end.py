"""A killed process leaves its connections, and what held its memory ends with it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from expert_hosts import PATIENCE_S, wait_until

from experts.kernels.compiler import load

SERVE = """
import socket, sys, threading
from experts.sudden_end import close_sockets_first
keepers = []
thread = threading.Thread(target=lambda: keepers.append(close_sockets_first()))
thread.start()
thread.join()  # The keeper stays when the thread that made it ends.
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], keepers[0], flush=True)
    connection, _ = listener.accept()
    connection.sendall(b"!")
    sys.stdin.read()
"""

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def is_alive(pid: int) -> bool:
    """Whether it runs; one that has ended and is not buried yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.fixture
def served() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", SERVE], stdin=-1, stdout=-1, text=True)
    yield process
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


@needs_compiler
@pytest.mark.parametrize("how", ["killed", "ended"])
def test_the_keeper_ends_with_its_process_and_holds_no_connection(how: str, served: subprocess.Popen[str]) -> None:
    assert served.stdin is not None and served.stdout is not None
    port, keeper = map(int, served.stdout.readline().split())
    wait_until(lambda: len(list(Path(f"/proc/{keeper}/fd").iterdir())) == 1, "only its look at the process is open")
    assert Path(f"/proc/{keeper}/comm").read_text() == "herd-keeper\n"
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        assert client.recv(1) == b"!"
        if how == "killed":
            served.kill()
        else:
            served.stdin.close()
        assert client.recv(1) == b""
    wait_until(lambda: not is_alive(keeper), "the keeper ends")


def test_without_a_compiler_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import experts.sudden_end as sudden_end

    monkeypatch.setattr(sudden_end, "load", lambda source, needed: load(source, compiler="no-cc", cache_dir=tmp_path))
    assert sudden_end.close_sockets_first.__wrapped__() is None
