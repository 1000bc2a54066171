"""What makes threads and the conditions that they wait on: the module `threading`, or a simulator's virtual time.

Code that takes a `Threads` waits in no other way, so that it runs in both unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol


class Condition(Protocol):
    """What is used of a `threading.Condition`."""

    def __enter__(self) -> bool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def wait(self, timeout: float | None = None) -> bool: ...

    def notify_all(self) -> None: ...


class Thread(Protocol):
    """What is used of a `threading.Thread`."""

    @property
    def ident(self) -> int | None: ...

    def start(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...

    def is_alive(self) -> bool: ...


class Threads(Protocol):
    """Names and arguments are those of the module `threading`, which is one."""

    def Condition(self) -> Condition: ...

    def Thread(self, *, target: Callable[[], None], name: str, daemon: bool) -> Thread: ...
