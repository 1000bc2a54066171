"""C files of ours become libraries once per machine, and nothing that may go wrong on the way stops a process."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compiled import needs_kernels

from experts.kernels import compiler
from experts.kernels.compiler import DRAFT, FLAGS, STALE_S, load

SOURCE = '#include "vector.h"\nint herd_answer(void) { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "answer.c"
    file.write_text(SOURCE.replace("ANSWER", "42"))
    return file


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kernels"


def answer(library: ctypes.CDLL | None) -> int:
    assert library is not None
    return int(library.herd_answer())


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


@needs_kernels
def test_a_second_load_compiles_nothing(source: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(load(source, cache_dir=cache_dir)) == 42
    [library] = cache_dir.iterdir()
    written = library.stat().st_mtime_ns
    assert library.stat().st_mode & 0o022 == 0 and cache_dir.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(compiler, "_compile", None)
    assert answer(load(source, cache_dir=cache_dir)) == 42
    assert library.stat().st_mtime_ns == written


@needs_kernels
def test_whatever_a_library_is_made_of_is_in_its_name(
    source: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert answer(load(source, cache_dir=cache_dir)) == 42
    assert answer(load(source, flags=(*FLAGS, "-O1"), cache_dir=cache_dir)) == 42
    source.write_text(SOURCE.replace("ANSWER", "43"))
    assert answer(load(source, cache_dir=cache_dir)) == 43
    more = compiler.cpu_flags() | {"another"}
    monkeypatch.setattr(compiler, "cpu_flags", lambda: more)
    assert answer(load(source, cache_dir=cache_dir)) == 43
    header = tmp_path / "vector.h"
    header.write_text("#pragma once\n")
    monkeypatch.setattr(compiler, "HEADERS", (header,))
    assert answer(load(source, cache_dir=cache_dir)) == 43
    wrapper = tmp_path / "other-cc"
    wrapper.write_text('#!/bin/sh\n[ "$1" = --version ] && echo other\nexec cc "$@"\n')
    wrapper.chmod(0o700)
    assert answer(load(source, cache_dir=cache_dir, compiler=str(wrapper))) == 43
    assert len(libraries(cache_dir)) == 6


@needs_kernels
def test_without_a_compiler(source: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(source, cache_dir=cache_dir, compiler="no-such-compiler") is None
    assert "answer.c is not used, it is done without" in caplog.text and "no-such-compiler" in caplog.text


def test_without_the_instructions(
    source: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(compiler, "cpu_flags", frozenset)
    assert load(source, cache_dir=cache_dir) is None
    assert "this CPU lacks avx512_bf16, avx512bw, avx512f, avx512vl" in caplog.text and not cache_dir.exists()


@needs_kernels
def test_a_source_that_is_broken(source: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    source.write_text("int herd_answer(void) { return forty_two; }\n")
    assert load(source, cache_dir=cache_dir) is None
    assert "forty_two" in caplog.text and list(cache_dir.iterdir()) == []


@needs_kernels
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_to(
    source: Path, cache_dir: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache_dir.mkdir(parents=True)
    cache_dir.chmod(mode)
    assert load(source, cache_dir=cache_dir) is None
    assert f"{cache_dir} must be a folder of this user that others cannot write to" in caplog.text
    assert list(cache_dir.iterdir()) == []


@needs_kernels
def test_a_folder_that_is_a_link(source: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Whoever made the link may point it elsewhere tomorrow."""
    cache_dir.parent.mkdir()
    cache_dir.symlink_to(tmp_path)
    assert load(source, cache_dir=cache_dir) is None


@needs_kernels
def test_without_a_home_to_write_to(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert answer(load(source)) == 42
    assert len(libraries(tmp_path / f"herd-kernels-{os.getuid()}")) == 1


@needs_kernels
def test_without_any_home(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiler.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compiler.Path, "home", homeless)
    assert answer(load(source)) == 42


@needs_kernels
def test_with_no_place_at_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    monkeypatch.setattr(compiler.tempfile, "tempdir", "/dev/null")
    assert load(source) is None
    assert "/dev/null/nowhere" in caplog.text


@needs_kernels
def test_a_folder_that_may_only_be_read_serves_what_it_has(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler.tempfile, "tempdir", str(tmp_path / "spare"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert answer(load(source)) == 42
    monkeypatch.setattr(compiler.os, "access", lambda path, _mode: "spare" in str(path))
    assert answer(load(source)) == 42
    assert not (tmp_path / "spare").exists()
    assert answer(load(source, flags=(*FLAGS, "-O1"))) == 42
    assert len(libraries(tmp_path / "spare" / f"herd-kernels-{os.getuid()}")) == 1


@needs_kernels
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.8, 0.999])
def test_a_library_that_was_cut_off_is_compiled_anew(source: Path, cache_dir: Path, share: float) -> None:
    """Loading one would kill the process."""
    cut_off = (
        "import sys; from pathlib import Path; from experts.kernels import compiler\n"
        "library = compiler.load(Path(sys.argv[1]), cache_dir=Path(sys.argv[2]))\n"
        "print(library.herd_answer())\n"
    )

    def loaded_elsewhere() -> str:
        command = [sys.executable, "-c", cut_off, str(source), str(cache_dir)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    assert loaded_elsewhere() == "42\n"
    [library] = libraries(cache_dir)
    content = library.read_bytes()
    library.write_bytes(content[: int(share * len(content))])
    assert loaded_elsewhere() == "42\n"
    assert library.read_bytes()[:-32] == content[:-32]


@needs_kernels
def test_a_library_that_is_no_longer_itself_is_compiled_anew(source: Path, cache_dir: Path) -> None:
    load(source, cache_dir=cache_dir)
    [library] = libraries(cache_dir)
    content = library.read_bytes()
    library.unlink()
    library.write_bytes(content[:700] + b"?" + content[701:])
    assert answer(load(source, cache_dir=cache_dir)) == 42


@needs_kernels
def test_drafts_of_the_dead_are_cleared_away_and_those_of_the_living_are_not(source: Path, cache_dir: Path) -> None:
    cache_dir.mkdir(parents=True, mode=0o700)
    old, young = cache_dir / f"old{DRAFT}", cache_dir / f"young{DRAFT}"
    old.touch()
    young.touch()
    os.utime(old, (0, time.time() - STALE_S - 60))
    assert answer(load(source, cache_dir=cache_dir)) == 42
    assert not old.exists() and young.exists()


@needs_kernels
def test_processes_that_compile_the_same_at_once(source: Path, cache_dir: Path) -> None:
    """All of them begin when they are told to, and each gets a library."""
    script = (
        "import sys; from pathlib import Path; from experts.kernels import compiler\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(compiler.load(Path(sys.argv[1]), cache_dir=Path(sys.argv[2])).herd_answer())\n"
    )
    command = [sys.executable, "-c", script, str(source), str(cache_dir)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    outputs = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        output, _ = process.communicate(timeout=120)
        outputs.append(output)
    assert outputs == ["42\n"] * 4
    assert [file.suffix for file in cache_dir.iterdir()] == [".so"]
