"""The Ray that `herd serve` runs on: one of its own, made and removed with it, or one that is there already."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import ray

import cluster
from cluster.config import ServeSettings
from cluster.on_ray.find import NAMESPACE
from cluster.processes import adopt_orphans, command, descendants, end_descendants, is_alive
from cluster.topology import OBJECT_STORE_BYTES
from experts.errors import HerdError, InvalidInput

PARENT = Path("/tmp")
PREFIX = "herd-ray-"
LOCK = "lock"
HEAD, NODE = "gcs_server", "raylet"
"""Ray's programs: the head starts and replaces actors, the node's keeps them alive."""
HEADLESS_S = 7 * 24 * 3600
"""How long everything goes on without the head; Ray's own default is a minute."""
LAST_WORDS_S = 5.0


class RayFailed(HerdError):
    """Ray could not be started or joined."""


class OwnRay:
    """A Ray of one machine that lives as long as this process: its parts end with it, however it ends."""

    def __init__(self) -> None:
        _remove_leftovers()
        # Short, because the paths of Unix sockets below it may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=PARENT))
        # Held as long as this process lives: whoever tidies up may know other processes by other numbers.
        self._lock = (self.folder / LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._head: list[int] = []
        self._node: list[int] = []

    def start(self) -> None:
        """Raises RayFailed."""
        adopt_orphans()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray takes its workers for background work.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(HEADLESS_S))
        # Workers import the packages from where this process has them, installed or not.
        roots = [str(Path(cluster.__path__[0]).parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(root for root in roots if root)
        try:
            ray.init(
                address="local",
                namespace=NAMESPACE,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                # Ray opens its folder to everybody; the one around it stays closed.
                _temp_dir=str(self.folder / "r"),
            )
        # Ray raises plain Exception too, when its parts take too long.
        except Exception as error:
            raise RayFailed(f"Ray did not start: {_first_line(error)}") from error

        self._head, self._node = (
            [pid for pid in descendants(os.getpid()) if command(pid).endswith(program)] for program in (HEAD, NODE)
        )

    def is_alive(self) -> bool:
        """Whether the program runs that our processes end with."""
        return all(is_alive(pid) for pid in self._node)

    def has_head(self) -> bool:
        """Whether Ray can still start and replace processes, and end in order."""
        return self.is_alive() and all(is_alive(pid) for pid in self._head)

    def rest(self) -> None:
        """Once the head is gone: Ray's thread for errors would take a whole processor to hear of none."""
        with suppress(AttributeError):  # It is Ray's own affair, and may be another way in the next version.
            ray._private.worker.global_worker.threads_stopped.set()

    def stop(self) -> None:
        """End Ray and remove its files."""
        ray.shutdown()
        end_descendants(os.getpid(), LAST_WORDS_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def abandon(self) -> None:
        """End everything below this process at once, and remove its files."""
        end_descendants(os.getpid(), 0.0)
        shutil.rmtree(self.folder, ignore_errors=True)


class JoinedRay:
    """A Ray cluster of somebody else, which stays when we go."""

    def __init__(self, settings: ServeSettings) -> None:
        self._address = settings.ray_address

    def start(self) -> None:
        """Raises InvalidInput when nothing answers there."""
        try:
            ray.init(address=self._address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            raise InvalidInput("ray-address", self._address, f"must be a Ray cluster: {_first_line(error)}") from error

    def stop(self) -> None:
        ray.shutdown()

    def is_alive(self) -> bool:
        """Ray tells its drivers by itself when it goes."""
        return True

    def has_head(self) -> bool:
        """Nobody here can tell."""
        return True

    def rest(self) -> None:
        """See OwnRay."""

    def abandon(self) -> None:
        """Nothing of it ends with us: actors and application go on until somebody ends them."""


def _remove_leftovers() -> None:
    """Folders of processes that were killed, and could not tidy up."""
    for folder in PARENT.glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not is_alive(int(owner)) and _is_left(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    """Whether `folder` is ours and nobody holds it."""
    try:
        if folder.stat().st_uid != os.getuid():
            return False
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
