"""An expert host in a process of its own, to be stopped and killed by tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from types import TracebackType

import torch
from expert_hosts import PATIENCE_S, make_host, make_terms

from experts.placement import ExpertKey, HostInfo
from experts.transport.grpc_server import serve_expert_host


def _serve(pipe: Connection, name: str, keys: list[ExpertKey], incarnation: int, port: int) -> None:
    torch.set_num_threads(1)
    server = serve_expert_host(
        make_host(name, keys),
        terms=make_terms(),
        incarnation=incarnation,
        bind="127.0.0.1",
        ports=range(port, port + 1) if port else None,
    )
    pipe.send(server.port)
    # Until the test ends, or its process does.
    try:
        pipe.recv()
    except EOFError:
        return
    server.stop(grace=1.0)


class HostProcess:
    """Starts with `with`, and is gone after it, stopped or not."""

    def __init__(self, name: str, keys: list[ExpertKey], incarnation: int = 1, port: int = 0) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, name, keys, incarnation, port), daemon=True)
        self._process.start()
        theirs.close()
        assert self._pipe.poll(3 * PATIENCE_S), "the host process did not start"
        self.port: int = self._pipe.recv()
        self.info = HostInfo(name=name, incarnation=incarnation, address=f"127.0.0.1:{self.port}")

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.join(PATIENCE_S)
        assert self._process.exitcode is not None

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def __enter__(self) -> HostProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.exitcode is None:
            self.kill()
        self._pipe.close()
        self._process.close()
