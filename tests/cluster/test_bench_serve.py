"""`herd bench serve` from end to end, against servers that follow a script."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from scripted_openai import BREAK, HANG, Answer, Script, Step, chunk, scripted, streamed

from cluster.cli import main
from cluster.run_file import RunFile, run_file_path, write_run_file


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cluster.run_file.os.getuid", lambda: 4_000_000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def bench(capsys: pytest.CaptureFixture[str], url: str, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit code and document of a run."""
    code = main(["bench", "serve", "--url", url, "--json", "-", *flags])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, json.loads(captured.out)


def good(_number: int, _asked: dict[str, Any]) -> Answer:
    return 200, streamed("a", "b c", "d", output_tokens=5)


def kinds(document: dict[str, Any]) -> dict[str, tuple[int, str]]:
    return {error["kind"]: (error["count"], error["example"]) for error in document["results"]["errors"]}


def test_a_closed_loop_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(good) as server:
        code, document = bench(
            capsys, server.url, "--requests", "10", "--concurrency", "3", "--warmup", "2", "--prompt", "20",
            "--output", "5", "--goodput", "e2el:1e9", "--api-key", "secret",
        )  # fmt: skip
    assert code == 0
    results, setup = document["results"], document["setup"]
    assert (results["completed"], results["failed"], results["errors"]) == (10, 0, [])
    assert (results["output_tokens"], results["prompt_tokens"], results["tokens_counted_by"]) == (50, 90, "usage")
    assert results["goodput_per_s"] == results["requests_per_s"] > 0
    assert all(results[name]["p99"] >= 0 for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"))
    assert (setup["model"], setup["server_version"], setup["cpus"]) == ("scripted", "7.5", os.cpu_count())
    assert document["arguments"]["concurrency"] == 3
    assert list(document["cpu_s"]) == ["this client"]
    assert "secret" not in json.dumps(document)
    assert server.headers["authorization"] == "Bearer secret"
    assert len(server.asked) == 12
    prompts = {tuple(asked["prompt"]) for asked in server.asked}
    assert len(prompts) == 12
    assert all(len(prompt) == 20 and min(prompt) >= 500 for prompt in prompts)
    assert all(asked["max_tokens"] == asked["min_tokens"] == 5 for asked in server.asked)


@pytest.mark.parametrize("loop", [["--concurrency", "4"], ["--request-rate", "inf"]])
def test_requests_are_under_way_together(capsys: pytest.CaptureFixture[str], loop: list[str]) -> None:
    """No answer begins, or ends, before four were asked for."""

    def script(number: int, _asked: dict[str, Any]) -> Answer:
        pieces = streamed("a", "b", output_tokens=2)
        return 200, [4, *pieces] if number % 2 else [*pieces[:1], 4, *pieces[1:]]

    with scripted(script) as server:
        code, document = bench(capsys, server.url, "--requests", "4", "--warmup", "0", *loop)
    assert (code, document["results"]["completed"], len(server.asked)) == (0, 4, 4)


def test_an_open_loop_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(good) as server:
        code, document = bench(capsys, server.url, "--requests", "30", "--request-rate", "inf", "--workload", "mixed")
        assert (code, document["results"]["completed"]) == (0, 30)
        assert document["arguments"]["request_rate"] == "inf"
        assert document["results"]["late_ms"]["p50"] is not None
        code, document = bench(
            capsys, server.url, "--requests", "30", "--request-rate", "2000", "--burstiness", "0.5", "--plain"
        )
    assert (code, document["results"]["completed"]) == (0, 30)
    assert "ignore_eos" not in server.asked[-1]


@pytest.mark.parametrize("workload", ["text", "shared-prefix", "mixed", "images", "skewed"])
def test_every_workload_reaches_the_server(capsys: pytest.CaptureFixture[str], workload: str) -> None:
    with scripted(good) as server:
        code, document = bench(capsys, server.url, "--requests", "4", "--workload", workload, "--warmup", "0")
    assert (code, document["results"]["completed"], len(server.asked)) == (0, 4, 4)
    if workload == "images":
        parts = server.asked[0]["messages"][0]["content"]
        assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_chats_end_to_end_without_usage(capsys: pytest.CaptureFixture[str]) -> None:
    def chat(_number: int, _asked: dict[str, Any]) -> Answer:
        deltas = [{"role": "assistant", "content": ""}, {"content": "x"}, {"content": "y"}]
        return 200, [*(chunk(choices=[{"delta": delta}]) for delta in deltas), b"data: [DONE]\n\n"]

    with scripted(chat, has_tokenizer=False) as server:
        code, document = bench(capsys, server.url, "--requests", "3", "--chat", "--prompt", "12")
    assert code == 0
    results = document["results"]
    assert (results["output_tokens"], results["tokens_counted_by"]) == (6, "chunks")
    assert (results["prompt_tokens"], results["total_tokens_per_s"]) == (None, None)
    assert len(server.asked[0]["messages"][0]["content"].split()) == 12


BAD: list[tuple[Answer, str, str]] = [
    ((429, [b'{"error": {"message": "queue is full"}}']), "http_429", "queue is full"),
    ((500, [b"<html>\nsorry"]), "http_500", "<html> sorry"),
    ((503, []), "http_503", "Said"),
    ((200, streamed("a", "b", done=False)), "cut_off", "after 2 chunks"),
    ((200, [*streamed("a", done=False), BREAK]), "cut_off", "the connection broke in the stream"),
    ((200, [*streamed("a", done=False), chunk(error={"message": "expert is away"})]), "stream_error", "expert is away"),
    ((200, [b"data: nonsense\n\n"]), "bad_event", "nonsense"),
    ((200, streamed()), "empty", "without any text"),
    ((200, [b'{"object": "text_completion"}']), "cut_off", "after 0 chunks"),
]


@pytest.mark.parametrize(("answer", "kind", "words"), BAD)
def test_failures_are_counted_by_kind_beside_what_succeeds(
    capsys: pytest.CaptureFixture[str], answer: Answer, kind: str, words: str
) -> None:
    def script(number: int, _asked: dict[str, Any]) -> Answer:
        return answer if number % 2 else good(number, _asked)

    with scripted(script) as server:
        code, document = bench(capsys, server.url, "--requests", "6", "--warmup", "0", "--concurrency", "1")
    assert (code, document["results"]["completed"], document["results"]["failed"]) == (0, 3, 3)
    ((found, (count, example)),) = kinds(document).items()
    assert (found, count) == (kind, 3)
    assert words in example


@pytest.mark.parametrize("steps", [[HANG], [*streamed("a", done=False), HANG]])
def test_a_server_that_falls_silent_is_a_timeout(capsys: pytest.CaptureFixture[str], steps: list[Step]) -> None:
    with scripted(lambda _number, _asked: (200, steps)) as server:
        code, document = bench(
            capsys, server.url, "--requests", "2", "--warmup", "0", "--timeout-s", "0.3", "--model", "m",
            "--vocab-size", "1000",
        )  # fmt: skip
    assert code == 1
    assert kinds(document)["timeout"][0] == 2


def test_when_nothing_succeeds_the_exit_code_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code, document = bench(capsys, url, "--requests", "3", "--model", "m", "--vocab-size", "1000")
        assert (code, document["results"]["completed"]) == (1, 0)
        assert kinds(document)["connect"][0] == 3
        assert main(["bench", "serve", "--url", url]) == 1
    captured = capsys.readouterr()
    assert "--model" in captured.err
    assert "connect" in captured.err
    assert captured.err.count("\n") == 1


def test_a_server_without_tokenize_needs_a_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(good, has_tokenizer=False) as server:
        assert main(["bench", "serve", "--url", server.url]) == 2
        assert "vocab-size: must be given" in capsys.readouterr().err
        code, document = bench(capsys, server.url, "--vocab-size", "32000", "--requests", "2")
    assert (code, document["results"]["completed"]) == (0, 2)
    assert all(2000 <= token < 28_000 for asked in server.asked for token in asked["prompt"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workload", "poetry"], "workload: must be one of"),
        (["--goodput", "itl:3"], "goodput: must be like"),
        (["--concurrency", "2", "--request-rate", "1"], "concurrency: does not go with request-rate"),
        (["--json", "/nowhere/at/all"], "json: must be a file that can be written"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    with scripted(good) as server:
        assert main(["bench", "serve", "--url", server.url, "--requests", "1", *flags]) == 2
    assert words in capsys.readouterr().err


def interrupting(after: int) -> Script:
    def script(number: int, asked: dict[str, Any]) -> Answer:
        if number < after:
            return good(number, asked)
        os.kill(os.getpid(), signal.SIGINT)
        return 200, [HANG]

    return script


def test_an_interrupt_keeps_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(interrupting(3)) as server:
        code, document = bench(capsys, server.url, "--requests", "9", "--warmup", "0", "--concurrency", "1")
    assert code == 130
    results = document["results"]
    assert (results["completed"], results["unfinished"], results["unsent"]) == (3, 1, 5)


def test_an_interrupt_before_anything_was_measured_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(interrupting(0)) as server:
        assert main(["bench", "serve", "--url", server.url]) == 1
    assert "stopped before anything was measured" in capsys.readouterr().err


def test_the_table_and_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with scripted(good) as server:
        file = tmp_path / "result.json"
        assert main(["bench", "serve", "--url", f"{server.url}/v1", "--requests", "2", "--json", str(file)]) == 0
    captured = capsys.readouterr()
    assert "2 requests completed, 0 failed" in captured.out
    assert "requests: 2 of 2" in captured.err
    assert json.loads(file.read_text())["results"]["completed"] == 2


def test_a_dead_cluster_s_run_file_is_no_obstacle(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with scripted(good) as server:
        port = int(server.url.rpartition(":")[2])
        folder = tmp_path / "herd"
        folder.mkdir()
        leftover = RunFile(name="herd", control="127.0.0.1:1", pid=1, http=server.url)
        write_run_file(run_file_path(folder, "herd", port), leftover)
        code, document = bench(capsys, server.url, "--requests", "1")
    assert (code, list(document["cpu_s"])) == (0, ["this client"])
