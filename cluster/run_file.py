"""Run files: how a command on this machine finds the controllers that run on it.

One JSON file per cluster in a folder only its user can read. The controller writes it at each start and removes it at
the end; a file whose controller does not answer is a leftover and means nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from experts.errors import InvalidInput
from experts.tls import Identity, load_identity

RUNTIME_VARIABLE = "XDG_RUNTIME_DIR"


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """What a run file says: the cluster's name, the controller's address and pid, the URL that it serves, and where
    certificate, key and CA lie that the controller wants to see."""

    name: str
    control: str
    pid: int
    http: str
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""

    def identity(self) -> Identity | None:
        """Raises InvalidInput when the files cannot be used."""
        return load_identity(self.tls_cert, self.tls_key, self.tls_ca)


def state_dirs(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where run files may lie, the place for new ones first."""
    shared = Path(f"/tmp/herd-{os.getuid()}")
    runtime = environment.get(RUNTIME_VARIABLE, "")
    return (Path(runtime) / "herd", shared) if runtime and Path(runtime).is_dir() else (shared,)


def prepare_state_dir(folder: Path) -> Path:
    """Make `folder` if needed, for this user alone. Raises InvalidInput when that fails or somebody else owns it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput("state-dir", str(folder), f"must be a folder that can be made: {error.strerror}") from None
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise InvalidInput("state-dir", str(folder), "must belong to the user who runs this")
    folder.chmod(0o700)
    return folder


def run_file_path(folder: Path, name: str, port: int) -> Path:
    """Two clusters of one name on one machine differ in their HTTP port."""
    return folder / f"{name}-{port}.json"


def write_run_file(path: Path, content: RunFile) -> None:
    """Replace `path` as a whole, readable by this user alone."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(asdict(content), file)
    os.replace(fresh, path)


def read_run_files(folders: tuple[Path, ...]) -> Iterator[RunFile]:
    """All that can be read in `folders`, the newest first."""
    found = [path for folder in folders if folder.is_dir() for path in folder.glob("*.json")]
    dated = sorted(((_modified(path), path) for path in found), reverse=True)
    for _, path in dated:
        content = _read(path)
        if content is not None:
            yield content


def _read(path: Path) -> RunFile | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        names = ("name", "control", "http", *(name for name in ("tls_cert", "tls_key", "tls_ca") if name in raw))
        return RunFile(pid=int(raw["pid"]), **{name: str(raw[name]) for name in names})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
