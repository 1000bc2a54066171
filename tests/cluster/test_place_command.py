"""What persons hand to the commands about placement, before any controller is asked."""

import json
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.place import command
from cluster.place.command import read_target
from experts.errors import InvalidInput


def written(path: Path, hosts: object) -> Path:
    path.write_text(json.dumps({"target": [{"layer": 0, "expert": 1, "hosts": hosts}]}), encoding="utf-8")
    return path


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_target(written(tmp_path / "plan.json", ["h1", "h0"])) == {(0, 1): ("h1", "h0")}


@pytest.mark.parametrize("hosts", ["h0", {"h0": 1}, [0], None, ["\ud800"], ["\x1b[2J"]])
def test_hosts_of_a_plan_are_a_list_of_names(tmp_path: Path, hosts: object) -> None:
    with pytest.raises(InvalidInput, match=r"must be \{.target."):
        read_target(written(tmp_path / "plan.json", hosts))


@pytest.mark.parametrize(
    ("option", "words"), [("--load", "trace: must be a file"), ("--prometheus", "prometheus: must be a URL")]
)
def test_a_source_of_the_load_that_is_empty_is_not_taken_for_none(
    capsys: pytest.CaptureFixture[str], option: str, words: str
) -> None:
    assert main(["plan", option, ""]) == 2
    assert words in capsys.readouterr().err


def test_a_controller_that_is_starting_is_asked_again_and_other_refusals_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "POLL_S", 0.0)
    answers = iter([InvalidInput("controller", "starting", "must have heard"), None])

    def ask() -> str:
        if (problem := next(answers)) is not None:
            raise problem
        return "done"

    assert command._patiently(ask) == "done"
    answers = iter([InvalidInput("to", "h9", "must be a host"), None])
    with pytest.raises(InvalidInput, match="h9"):
        command._patiently(ask)
    monkeypatch.setattr(command, "STARTING_S", 0.0)
    answers = iter([InvalidInput("controller", "starting", "must have heard"), None])
    with pytest.raises(InvalidInput, match="starting"):
        command._patiently(ask)
