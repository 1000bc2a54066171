"""The whole cluster through the front door: `herd serve`, HTTP, `herd status`, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from picture_questions import check_alone_and_in_a_crowd
from serving import Cluster, Judge, serving, state_env, until

from cluster.tiny import make_tiny

pytestmark = pytest.mark.cluster

LENGTHS = [1, 5, 17, 63, 64, 65, 100, 130]
OUTPUT = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind in ("scout", "maverick"):
        made[kind] = tmp_path_factory.mktemp("models") / f"tiny-{kind}"
        make_tiny(kind, made[kind])
    return made


def prompts(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 2000, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["scout", "maverick"])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_greedy_answers_equal_the_reference(folders: dict[str, Path], tmp_path: Path, kind: str, hosts: int) -> None:
    """Over any number of hosts."""
    judge = Judge(folders[kind])
    with serving(folders[kind], tmp_path, "--hosts", str(hosts), "--kv-memory", "128MiB") as cluster:
        status = cluster.status()
        assert len(status["hosts"]) == hosts
        check_greedy(cluster, judge, seed=hosts)


def check_greedy(cluster: Cluster, judge: Judge, seed: int) -> None:
    """Prompts around chunk borders (64) and temperature steps (32), all at once, and every host has a part in them."""
    questions, accepted = prompts(LENGTHS, seed), judge.accepted
    for prompt, answer in zip(questions, cluster.complete_all(questions, [OUTPUT] * len(questions)), strict=True):
        judge.check(prompt, OUTPUT, answer)
    until("rows of every host are reported", lambda: rows_everywhere(cluster))
    assert judge.accepted - accepted <= 1


def rows_everywhere(cluster: Cluster) -> bool:
    hosts = cluster.status().get("hosts", [])
    return bool(hosts) and all(host["rows_total"] for host in hosts)


@pytest.fixture(scope="module")
def cluster(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One running cluster for the tests below: two hosts, two routers."""
    flags = ["--hosts", "2", "--routers", "2", "--kv-memory", "128MiB", "--max-batch-tokens", "64"]
    with serving(folders["scout"], tmp_path_factory.mktemp("state"), *flags) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def judge(folders: dict[str, Path]) -> Judge:
    return Judge(folders["scout"])


def test_greedy_answers_over_two_hosts_equal_the_reference(cluster: Cluster, judge: Judge) -> None:
    check_greedy(cluster, judge, seed=2)
    until("two hosts, routers and ingresses and a controller", lambda: len(cluster.pids()) == 7)


def test_stock_openai_client(cluster: Cluster) -> None:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=120) as client:
        assert [model.id for model in client.models.list()] == [cluster.model]
        messages = [{"role": "user", "content": "Hello"}]
        whole = client.chat.completions.create(
            model=cluster.model, messages=messages, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
        assert whole.usage.completion_tokens == 12
        stream = client.chat.completions.create(
            model=cluster.model, messages=messages, max_tokens=12, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert streamed == whole.choices[0].message.content


def test_bad_input_is_named_and_harms_nobody(cluster: Cluster) -> None:
    for body, status, field in [
        ({"model": "other", "prompt": "x"}, 404, "model"),
        ({"model": cluster.model, "prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        ({"model": cluster.model, "prompt": [5] * 100_000}, 400, "prompt"),
        ({"model": cluster.model, "prompt": [10**9]}, 400, "prompt"),
    ]:
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
        error = answer.json()["error"]
        assert (answer.status_code, field) == (status, re.split(r"[.\[]", error["param"] or "")[0]), answer.text
    broken = httpx.post(
        f"{cluster.url}/v1/completions", content=b"{", headers={"content-type": "application/json"}, timeout=60
    )
    assert broken.status_code == 400
    assert cluster.complete([1, 2, 3], 4)


def test_32_streams_of_mixed_lengths_each_equal_their_solo_run(cluster: Cluster, judge: Judge) -> None:
    lengths = [1 + 7 * number % 140 for number in range(32)]
    outputs = [1 + 5 * number % 24 for number in range(32)]
    questions, accepted = prompts(lengths, seed=32), judge.accepted
    for prompt, output, answer in zip(questions, outputs, cluster.complete_all(questions, outputs), strict=True):
        judge.check(prompt, output, answer)
    assert judge.accepted - accepted <= 1


def test_pictures_and_text_equal_the_reference(cluster: Cluster, judge: Judge, folders: dict[str, Path]) -> None:
    accepted = judge.accepted
    check_alone_and_in_a_crowd(cluster, folders["scout"], judge)
    assert judge.accepted - accepted <= 2


@pytest.mark.parametrize(
    "workload",
    ["shared-prefix", "images", *(pytest.param(one, marks=pytest.mark.soak) for one in ("text", "mixed", "skewed"))],
)
def test_a_load_is_answered_and_measured(cluster: Cluster, workload: str) -> None:
    flags = ["--workload", workload, "--requests", "6", "--concurrency", "3", "--output", "16", "--prefix", "70"]
    command = [sys.executable, "-m", "cluster", "bench", "serve", "--url", cluster.url, "--json", "-", *flags]
    done = subprocess.run(
        command, capture_output=True, timeout=300, check=False, env={**os.environ, **state_env(cluster.state_dir)}
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    results = document["results"]
    assert (results["completed"], results["failed"], results["tokens_counted_by"]) == (6, 0, "usage")
    if workload != "mixed":
        assert results["output_tokens"] == 6 * 16
    if workload in ("text", "skewed", "shared-prefix"):
        assert results["prompt_tokens"] == 6 * (128 + (70 if workload == "shared-prefix" else 0))
    parts = {"ingress", "router without engine", "router's engine", "expert hosts", "this client"}
    assert set(document["cpu_s"]) == parts
    assert document["cpu_s"]["router's engine"] > 0
    assert document["cpu_s_outside_engine"] > 0


@pytest.mark.parametrize("what", ["hosts", "routers", "controller"])
def test_kill_9_ends_no_stream(cluster: Cluster, judge: Judge, what: str) -> None:
    """Streams under way go on, token for token; the killed process is replaced; new questions are answered."""
    status = cluster.status()
    found = status[what]
    victim = found[0]["pid"] if isinstance(found, list) else found["pid"]
    questions, output = prompts([3, 20, 70, 110], seed=9), 150
    killer = threading.Timer(0.4, os.kill, (victim, signal.SIGKILL))
    killer.start()
    answers = cluster.complete_all(questions, [output] * 4)
    killer.join()
    for prompt, answer in zip(questions, answers, strict=True):
        judge.check(prompt, output, answer)
    until(f"all {what} are back", lambda: healthy(cluster, victim))
    judge.check(questions[0], 8, cluster.complete(questions[0], 8))


def healthy(cluster: Cluster, victim: int) -> bool:
    status = cluster.status()
    pids = [process["pid"] for kind in ("hosts", "routers") for process in status.get(kind, [])]
    ready = all(host["state"] == "ready" for host in status.get("hosts", []))
    return len(pids) == 4 and victim not in pids and ready and status["controller"]["pid"] != victim
