"""Compiles a C file of ours with the machine's compiler, once per machine, and loads it.

The library is kept in the user's cache folder under a name made of everything it depends on, so processes of one
machine share it and other machines never load it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
HEADERS = tuple(sorted(HERE.glob("*.h")))
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
WITHOUT_AMX = (*FLAGS, "-mno-amx-bf16", "-mno-amx-tile", "-mno-amx-int8")
TIMEOUT_S = 60.0
NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16"})
"""What most of our C files ask of a CPU."""
DRAFT, STALE_S = ".draft", 10 * TIMEOUT_S
DIGEST_BYTES = hashlib.sha256().digest_size

POINTER, NUMBER, REAL, THREADS = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
"""What the functions of our C files take."""


def load(
    source: Path,
    *,
    flags: Sequence[str] = FLAGS,
    cache_dir: Path | None = None,
    compiler: str = "cc",
    needed: Set[str] = NEEDED,
) -> ctypes.CDLL | None:
    """The library made of `source`; None, with the reason in the log, where it cannot be had.

    `needed` is what the CPU must be able to do, as Linux names it. Without a `cache_dir` the library is kept in the
    user's cache folder, or in one of the user's among the temporary files.
    """
    missing = needed - cpu_flags()
    if missing:
        log.info("%s is not used: this CPU lacks %s", source.name, ", ".join(sorted(missing)))
        return None
    try:
        name = f"{source.stem}-{_fingerprint(source, flags, compiler)}.so"
        library = _private_folder(_cache_dirs() if cache_dir is None else (cache_dir,), name) / name
        if not _is_whole(library):
            _compile(source, library, (compiler, *flags))
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s is not used, it is done without: %s", source.name, _reason(error))
        return None


def prepared(variant: Callable[[Sequence[str]], ctypes.CDLL | None]) -> ctypes.CDLL | None:
    """Of a library that asks for AMX tiles, the variant (by compiler flags) that this process may run; None where there
    is none."""
    # A kernel may keep the tiles of a CPU that has them from its processes.
    for flags in (FLAGS, WITHOUT_AMX):
        library = variant(flags)
        if library is None or library.herd_prepare():
            return library
    return None


def declare(library: ctypes.CDLL, function: str, arguments: list[Any]) -> None:
    """Say what `function` takes; it gives nothing back."""
    getattr(library, function).argtypes = arguments
    getattr(library, function).restype = None


def cpu_flags() -> frozenset[str]:
    """What the CPU can do, as Linux names it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())


def _cache_dirs() -> Sequence[Path]:
    """Where libraries may be kept, the best place first."""
    spare = Path(tempfile.gettempdir()) / f"herd-kernels-{os.getuid()}"
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return (spare,)
    return (base / "herd" / "kernels", spare)


def _private_folder(folders: Sequence[Path], name: str) -> Path:
    """The first that can be used, to write or because `name` is there already; raises what is wrong with the first."""
    errors: list[OSError] = []
    for folder in folders:
        try:
            _make_private(folder)
            if os.access(folder, os.W_OK) or (folder / name).exists():
                return folder
            errors.append(PermissionError(f"{folder} cannot be written to"))
        except OSError as error:
            errors.append(error)
    raise errors[0]


def _make_private(folder: Path) -> None:
    """Whoever may write here runs code in our processes."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} must be a folder of this user that others cannot write to")


def _fingerprint(source: Path, flags: Sequence[str], compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT_S).stdout
    words = " ".join((*flags, "/", platform.machine(), *sorted(cpu_flags())))
    parts = (source.read_bytes(), *(header.read_bytes() for header in HEADERS), version, words.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _compile(source: Path, library: Path, command: Sequence[str]) -> None:
    """Write the library under another name first: several processes may be at it."""
    _clear_drafts(library.parent)
    handle, draft = tempfile.mkstemp(suffix=DRAFT, dir=library.parent)
    os.close(handle)
    try:
        include = f"-I{HERE}"
        subprocess.run(
            [*command, include, "-o", draft, str(source)], capture_output=True, check=True, timeout=TIMEOUT_S
        )
        _seal(Path(draft))
        os.replace(draft, library)
    finally:
        Path(draft).unlink(missing_ok=True)


def _clear_drafts(folder: Path) -> None:
    """Of processes that were killed over them."""
    for draft in folder.glob(f"*{DRAFT}"):
        with suppress(FileNotFoundError):
            if time.time() - draft.stat().st_mtime > STALE_S:
                draft.unlink()


def _seal(library: Path) -> None:
    """Put its digest behind it, where loaders do not look."""
    with library.open("r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _is_whole(library: Path) -> bool:
    """Whether it is there as it was written: loading one that was cut off kills the process."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return bytes(error.stderr).decode(errors="replace")[-500:]
    return str(error)
