"""`herd simulate placement`: what it prints for loads made up and recorded, and what it refuses."""

import json
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.simulate_placement.loads import TraceLoad
from experts.errors import InvalidInput

SHORT = ["simulate", "placement", "--seconds", "120", "--every", "60"]


def results(capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, float]]:
    assert main([*SHORT, *more, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)["results"]


def test_a_skewed_load_becomes_even(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = results(capsys, "--trace", "zipf:1.5", "--hosts", "4", "--replicas", "1.25")
    assert second["seconds"] == 120.0
    assert second["imbalance"] <= 1.1 < 1.5 <= second["unmoved"]
    assert first["loads"] > 0
    assert first["unserved"] == second["unserved"] == 0.0


def test_the_same_seed_gives_the_same_table(capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--trace", "zipf:1.0", "--hosts", "3", "--nodes", "2", "--drift", "0.2", "--shift", "50", "--seed", "7")
    assert results(capsys, *more) == results(capsys, *more)


def test_without_spare_room_nothing_is_replicated(capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(capsys, "--trace", "zipf:0", "--hosts", "4", "--replicas", "1")
    assert sum(row["loads"] for row in rows) == 0


def test_the_table_and_the_plans_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--trace", "zipf:1.5", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "change: " in out
    assert "layer 0: imbalance" in out
    assert "unmoved" in out
    assert " plans, " in out


def test_a_recorded_load_is_played_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    hot = {"interval_s": 30.0, "rows": {"1": [90000, 300, 300, 300], "3": [300, 300, 300, 300]}}
    cold = {"interval_s": 30.0, "rows": {"1": [300, 300, 300, 300], "3": [300, 300, 300, 90000]}}
    trace.write_text("\n".join(json.dumps(line) for line in (hot, hot, cold, cold)), encoding="utf-8")
    assert main(["simulate", "placement", "--trace", str(trace), "--hosts", "2", "--replicas", "2", "--json", "-"]) == 0
    [row] = json.loads(capsys.readouterr().out)["results"]
    assert row["seconds"] == 120.0
    assert row["worst"] <= 1.5

    load = TraceLoad(trace)
    assert load.step(45.0) == {**dict.fromkeys(load.keys, 10.0), (1, 0): 3000.0}
    half = load.step(30.0)
    assert half is not None
    assert half[1, 0] == pytest.approx((3000.0 + 10.0) / 2)
    assert load.step(45.0) is not None
    assert load.step(1.0) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "at least one interval"),
        ("{}", "must be"),
        ("[1]", "must be"),
        ('{"interval_s": 0, "rows": {"0": [1]}}', "must be"),
        ('{"interval_s": 1, "rows": {"0": [-1]}}', "must be"),
        ('{"interval_s": 1, "rows": {"0": [NaN]}}', "must be"),
        ('{"interval_s": 1, "rows": {"x": [1]}}', "must be"),
        ('{"interval_s": 1, "rows": {"0": [1' + "0" * 400 + "]}}", "must be"),
        ('{"interval_s": 1' + "0" * 400 + ', "rows": {"0": [1]}}', "must be"),
        ('{"interval_s": 1e308, "rows": {"0": [1]}}', "must be"),
        ('{"interval_s": 1e-300, "rows": {"0": [1]}}', "must be"),
        ('{"interval_s": "1", "rows": {"0": [1]}}', "must be"),
        ('{"interval_s": 1, "rows": {"0": [true]}}', "must be"),
        ('{"interval_s": 1, "rows": {"0": "11"}}', "must be"),
        ('{"interval_s": 1, "rows": {"0": [1], "00": [2]}}', "must be"),
        ('{"interval_s": 1, "rows": {"99999999999": [1]}}', "must be"),
        ('{"interval_s": 1, "rows": {"0": [1]}}\n{"interval_s": 1, "rows": {"0": [1, 2]}}', "the same layers"),
    ],
)
def test_bad_traces_are_named(tmp_path: Path, text: str, rule: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match=rule):
        TraceLoad(trace)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trace", "zipf:many"], "trace: must be zipf:EXPONENT"),
        (["--trace", "/nowhere"], "trace: must be a file that can be read"),
        (["--hosts", "0"], "hosts: must be between 1 and"),
        (["--replicas", "nan"], "replicas: must be between"),
        (["--expert-bytes", "0"], "expert-bytes: must be"),
    ],
)
def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main([*SHORT, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_a_trace_of_less_than_a_turn_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"interval_s": 4.0, "rows": {"0": [1, 2]}}', encoding="utf-8")
    assert main(["simulate", "placement", "--trace", str(trace)]) == 2
    assert "trace: must be of at least 5 seconds" in capsys.readouterr().err
