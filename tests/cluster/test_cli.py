"""The command line: instant help, one clear line per error, and the right exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.run_file import RunFile, run_file_path, state_dirs, write_run_file
from cluster.show import as_json, as_text
from cluster.tiny import make_tiny
from experts.placement import HostInfo, IngressInfo, RouterInfo
from experts.reports import ClusterStatus, ControllerInfo

STATUS = ClusterStatus(
    name="herd",
    controller=ControllerInfo(pid=11, address="127.0.0.1:7300", node="127.0.0.1", epoch=4),
    ingresses=(IngressInfo(name="ingress-a", pid=12, http="http://127.0.0.1:8000"),),
    routers=(RouterInfo(name="router-a", address="127.0.0.1:7200", pid=13, running=2, waiting=1),),
    hosts=(HostInfo(name="host-0", incarnation=1, address="127.0.0.1:7100", pid=14, state="lost", rows_total=99),),
    replicas_held=3,
    replicas_wanted=6,
    problems=("host host-0 is lost",),
)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cluster.run_file.os.getuid", lambda: 4_000_000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, cluster.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert "'argparse'" in loaded
    for heavy in ("torch", "ray", "grpc", "numpy", "prometheus_client", "fastapi"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["serve", "/nowhere/at/all"], 2, "MODEL_DIR: must be an existing folder"),
        (["serve", "/tmp", "--hosts", "0"], 2, "hosts: must be between"),
        (["serve", "/tmp", "--kv-memory", "much"], 2, "kv-memory: must be a size"),
        (["serve", "/tmp", "--transport", "smoke"], 2, "transport: must be one of"),
        (["status", "--control", "127.0.0.1:1"], 1, "127.0.0.1:1"),
        (["status"], 1, "no cluster of this user runs on this machine"),
        (["make-tiny", "scout", "/proc/nowhere"], 2, "dir"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_a_device_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_tiny("guard", tmp_path / "tiny")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "engine", str(tmp_path / "tiny"), "--transport", "local", "--device", "cuda"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "herd: device: needs a CUDA device, and torch finds none on this machine (got 'cuda')\n"


def test_a_leftover_run_file_is_not_a_cluster(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "herd"
    folder.mkdir()
    write_run_file(
        run_file_path(folder, "herd", 8000), RunFile(name="herd", control="127.0.0.1:1", pid=1, http="http://x")
    )
    assert main(["status"]) == 1
    assert "no cluster" in capsys.readouterr().err


def test_status_as_json_has_the_promised_names() -> None:
    shown = json.loads(json.dumps(as_json(STATUS)))
    assert {"pid", "address", "epoch"} <= set(shown["controller"])
    assert {"pid", "node", "http"} <= set(shown["ingress"][0])
    assert {"name", "node", "pid", "state", "running", "waiting"} <= set(shown["routers"][0])
    host = {"name", "node", "pid", "address", "transport", "state", "slots", "rows_total"}
    assert host <= set(shown["hosts"][0])


def test_status_as_text_fits_a_screen_and_names_what_is_wrong() -> None:
    text = as_text(STATUS)
    for words in ("epoch 4", "3 of 6", "http://127.0.0.1:8000", "2 running, 1 waiting", "lost", "problem: host host-0"):
        assert words in text
    assert len(text.splitlines()) < 12


def test_the_state_dir_of_the_fixture_is_nobodys() -> None:
    """Guards the fixture: the tests must never see a cluster that really runs here."""
    assert all("4000000" in str(folder) for folder in state_dirs({}))
