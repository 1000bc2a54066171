"""Threads in virtual time: of all of them and the world, one runs at a time, and the world says which.

Code that waits only by what a `Threads` makes (see `experts.threads`) runs here unchanged. A fiber runs from one wait
to the next without the world noticing: nothing comes between, and no time passes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.simulate.process import Process


class Killed(SystemExit):
    """Raised in a fiber whose process is dead, at the place where it waits."""


class Fiber:
    """A thread that runs while it holds the baton; fulfils `experts.threads.Thread`."""

    def __init__(self, process: Process, target: Callable[[], None], name: str) -> None:
        self._process = process
        self._target = target
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._started = self._ended = self._killed = False
        self._error: BaseException | None = None
        self._num_waits = 0
        """Tells a wake-up for this wait from one for an earlier wait."""
        self._awakened = False

    @property
    def ident(self) -> int | None:
        return self._thread.ident

    def start(self) -> None:
        self._started = True
        self._process.after(0.0, self._begin)

    def is_alive(self) -> bool:
        return self._started and not self._ended

    def join(self, timeout: float | None = None) -> None:
        """Does not wait: nothing can happen before the caller's own action is over."""

    def wait(self, timeout_s: float | None) -> bool:
        """From the fiber itself: give the baton back until `wake`, or for `timeout_s`. Whether it was woken."""
        self._num_waits += 1
        self._awakened = False
        number = self._num_waits
        if timeout_s is not None:
            self._process.after(timeout_s, lambda: self._resume(number))
        self._back.release()
        self._go.acquire()
        if self._killed:
            raise Killed
        return self._awakened

    def wake(self) -> None:
        """End its present wait."""
        number = self._num_waits
        if not self._awakened:
            self._awakened = True
            self._process.after(0.0, lambda: self._resume(number))

    def kill(self) -> None:
        self._killed = True
        if self._thread.ident is not None and not self._ended:
            self._switch()

    def _begin(self) -> None:
        self._thread.start()
        self._switch()

    def _resume(self, number: int) -> None:
        if number == self._num_waits and self.is_alive():
            self._switch()

    def _switch(self) -> None:
        """From the world: hand the baton over until the fiber waits again or ends."""
        before, self._process.threads.current = self._process.threads.current, self
        self._go.release()
        self._back.acquire()
        self._process.threads.current = before
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._killed:
                self._target()
        except Killed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._ended = True
            self._back.release()


class FiberCondition:
    """Fulfils `experts.threads.Condition`. Its lock is the baton."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._waiting: list[Fiber] = []

    def __enter__(self) -> bool:
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        return None

    def wait(self, timeout: float | None = None) -> bool:
        fiber = self._process.threads.current
        if fiber is None:
            return self._wait_outside(timeout)
        self._waiting.append(fiber)
        try:
            return fiber.wait(timeout)
        finally:
            if fiber in self._waiting:
                self._waiting.remove(fiber)

    def notify_all(self) -> None:
        self._num_notified += 1
        waiting, self._waiting = self._waiting, []
        for fiber in waiting:
            fiber.wake()

    _num_notified = 0

    def _wait_outside(self, timeout_s: float | None) -> bool:
        """Whoever drives the world waits: time passes meanwhile."""
        before, world = self._num_notified, self._process.world
        assert timeout_s is not None, "time would never stop"
        world.run(world.now + timeout_s, stop=lambda: self._num_notified > before)
        return self._num_notified > before


class FiberMaker:
    """The `experts.threads.Threads` of one process."""

    def __init__(self, process: Process) -> None:
        self.current: Fiber | None = None
        """The fiber of this process that holds the baton; None while the world or another process does."""
        self._process = process
        self._fibers: list[Fiber] = []

    def Condition(self) -> FiberCondition:
        return FiberCondition(self._process)

    def Thread(self, *, target: Callable[[], None], name: str, daemon: bool) -> Fiber:
        fiber = Fiber(self._process, target, name)
        self._fibers.append(fiber)
        return fiber

    def sleep(self, delay_s: float) -> None:
        """From a fiber: let `delay_s` pass."""
        assert self.current is not None, "only a fiber sleeps"
        self.current.wait(delay_s)

    def kill(self) -> None:
        for fiber in self._fibers:
            fiber.kill()
