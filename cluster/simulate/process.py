"""A process of the simulated cluster: what is due in it waits while it is stopped, and is forgotten when it dies."""

from __future__ import annotations

from cluster.simulate.fibers import FiberMaker
from cluster.simulate.world import Action, World


class Process:
    """One life of the process `name`. Everything that it does, it does in actions begun by `after` or `run`."""

    def __init__(self, world: World, name: str, life: int) -> None:
        self.world = world
        self.name = name
        self.life = life
        self.alive = True
        self.stopped = False
        self.threads = FiberMaker(self)
        self.at_death: list[Action] = []
        """What the operating system does when the process ends: closing its connections."""
        self._due: list[Action] = []

    def after(self, delay_s: float, action: Action) -> None:
        """Run `action` after `delay_s`, or when the process goes on; never when it is dead."""
        self.world.after(delay_s, lambda: self.run(action))

    def run(self, action: Action) -> None:
        """Run `action` now, or when the process goes on; never when it is dead."""
        if self.stopped:
            self._due.append(action)
        elif self.alive:
            action()

    def stop(self) -> None:
        """As SIGSTOP does: connections stay, nothing is done."""
        if self.alive and not self.stopped:
            self.note("stopped")
            self.stopped = True

    def go_on(self) -> None:
        """As SIGCONT does."""
        if self.alive and self.stopped:
            self.note("goes on")
            self.stopped = False
            due, self._due = self._due, []
            for action in due:
                self.world.after(0.0, lambda action=action: self.run(action))  # type: ignore[misc]

    def kill(self) -> None:
        """As SIGKILL does. Not to be called from a fiber of the process: see `exit`."""
        if not self.alive:
            return
        self.note("dies")
        self.alive, self.stopped, self._due = False, False, []
        self.threads.kill()
        for action in self.at_death:
            action()

    def exit(self) -> None:
        """End the process from within."""
        self.world.after(0.0, self.kill)

    def note(self, what: str) -> None:
        self.world.note(f"{self.name}.{self.life}", what)
