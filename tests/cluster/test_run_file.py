"""Run files: private, whole, newest first, and never trusted blindly."""

import os
from pathlib import Path

import pytest

from cluster.run_file import RunFile, prepare_state_dir, read_run_files, run_file_path, state_dirs, write_run_file
from experts.errors import InvalidInput


def content(name: str) -> RunFile:
    return RunFile(name=name, control="127.0.0.1:5", pid=3, http="http://127.0.0.1:8000")


def test_the_newest_comes_first_and_nonsense_is_passed_over(tmp_path: Path) -> None:
    for age, name in enumerate(["young", "old"]):
        path = run_file_path(tmp_path, name, 8000)
        write_run_file(path, content(name))
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "broken.json").write_text('{"name": ')
    (tmp_path / "other.json").write_text('["a"]')
    (tmp_path / "herd.journal").write_text("{}")
    assert list(read_run_files((tmp_path, tmp_path / "absent"))) == [content("young"), content("old")]


def test_only_the_user_can_read_them(tmp_path: Path) -> None:
    folder = prepare_state_dir(tmp_path / "state")
    path = run_file_path(folder, "herd", 8000)
    write_run_file(path, content("herd"))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in folder.iterdir()] == ["herd-8000.json"]


def test_a_folder_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(InvalidInput):
        prepare_state_dir(tmp_path / "link")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput) as caught:
        prepare_state_dir(tmp_path / "file" / "state")
    assert caught.value.field == "state-dir"


def test_the_runtime_folder_is_preferred_but_the_shared_one_is_searched_too(tmp_path: Path) -> None:
    shared = Path(f"/tmp/herd-{os.getuid()}")
    assert state_dirs({"XDG_RUNTIME_DIR": str(tmp_path)}) == (tmp_path / "herd", shared)
    assert state_dirs({"XDG_RUNTIME_DIR": str(tmp_path / "absent")}) == (shared,)
    assert state_dirs({}) == (shared,)
