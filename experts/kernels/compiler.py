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
import subprocess
import tempfile
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

HEADER = Path(__file__).with_name("vector.h")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=gnu11", f"-I{HEADER.parent}")
TIMEOUT_S = 60.0
NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16"})
"""What our C files ask of a CPU."""

POINTER, NUMBER, REAL, THREADS = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
"""What the functions of our C files take."""


def load(source: Path, *, cache_dir: Path | None = None, compiler: str = "cc") -> ctypes.CDLL | None:
    """The library made of `source`; None, with the reason in the log, where it cannot be had."""
    if not cpu_flags() >= NEEDED:
        log.info("%s is not used: this CPU lacks AVX512-BF16", source.name)
        return None
    try:
        folder = cache_dir or _cache_dir()
        _make_private(folder)
        library = folder / f"{source.stem}-{_fingerprint(source, compiler)}.so"
        if not library.exists():
            _compile(source, library, compiler)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s is not used, torch computes instead: %s", source.name, _reason(error))
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


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "herd" / "kernels"


def _make_private(folder: Path) -> None:
    """Whoever may write here runs code in our processes."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} must belong to this user, and others must not write to it")


def _fingerprint(source: Path, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT_S).stdout
    parts = [
        source.read_bytes(),
        HEADER.read_bytes(),
        version,
        " ".join(FLAGS[:-1]).encode(),
        platform.machine().encode(),
    ]
    parts.append(" ".join(sorted(cpu_flags())).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _compile(source: Path, library: Path, compiler: str) -> None:
    """Write the library under another name first: several processes may be at it."""
    handle, draft = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", draft, str(source)]
        subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT_S)
        os.replace(draft, library)
    finally:
        Path(draft).unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return bytes(error.stderr).decode(errors="replace")[-500:]
    return str(error)
