"""`herd serve --deterministic` answers to the bit what the engine answers in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from compiled import Threads
from deterministic import Answer, Ask, Desk, deterministic_decoder, open_deterministic
from serving import ANSWER_S, Cluster, serving, state_env, until

from cluster.processes import is_alive
from cluster.tiny import make_tiny

pytestmark = pytest.mark.cluster

LENGTHS = (1, 40, 64, 65, 100, 130)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "tiny-maverick"
    make_tiny("maverick", made)
    return made


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    generator = torch.Generator().manual_seed(8)
    prompts = [torch.randint(0, 2000, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Ask(prompt=tuple(prompt), seed=number, num_output=12) for number, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def expected(folder: Path, asks: list[Ask]) -> list[Answer]:
    with Threads(1):
        return Desk(deterministic_decoder(*open_deterministic(folder, "bfloat16"))).answer(asks)


@pytest.fixture(scope="module")
def cluster(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = ["--hosts", "4", "--routers", "2", "--deterministic", "--dtype", "bfloat16", "--kv-memory", "64MiB"]
    with serving(folder, tmp_path_factory.mktemp("state"), *flags) as cluster:
        yield cluster


def ask_over_http(cluster: Cluster, ask: Ask) -> list[float]:
    """Log probabilities of the answer's tokens."""
    body = {
        "model": cluster.model, "prompt": list(ask.prompt), "max_tokens": ask.num_output, "seed": ask.seed,
        "temperature": 0.9, "top_p": 0.95, "top_k": 40, "logprobs": 3, "ignore_eos": True,
    }  # fmt: skip
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=ANSWER_S)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["logprobs"]["token_logprobs"])


def test_answers_are_those_of_one_process(cluster: Cluster, asks: list[Ask], expected: list[Answer]) -> None:
    known = [[one.logprob for one in answer.logprobs if one is not None] for answer in expected]
    assert [ask_over_http(cluster, ask) for ask in asks] == known
    with ThreadPoolExecutor(3 * len(asks)) as threads:
        crowd = list(threads.map(lambda ask: ask_over_http(cluster, ask), 3 * asks))
    assert crowd == 3 * known


@pytest.mark.soak
def test_moves_and_drains_change_no_token(
    cluster: Cluster, asks: list[Ask], expected: list[Answer], tmp_path: Path
) -> None:
    """Under streams: an expert moves, a plan is applied, both are undone, a host is drained and ends, another comes."""
    known = [[one.logprob for one in answer.logprobs if one is not None] for answer in expected]
    changed = threading.Event()
    answered: list[list[float]] = []

    def ask_until_changed(number: int) -> int:
        rounds = 0
        while not changed.is_set() or rounds == 0:
            answered.append(ask_over_http(cluster, asks[number]))
            assert answered[-1] == known[number]
            rounds += 1
        return rounds

    with ThreadPoolExecutor(len(asks)) as threads:
        streams = [threads.submit(ask_until_changed, number) for number in range(len(asks))]
        try:
            epochs = [cluster.status()["controller"]["epoch"]]
            plan = json.loads(herd(cluster, "plan", "--dry-run", "--json"))
            layer, expert, here = plan["target"][0]["layer"], plan["target"][0]["expert"], plan["target"][0]["hosts"]
            there = next(name for name in ("host-0", "host-1", "host-2") if name not in here)
            herd(cluster, "move", "--layer", str(layer), "--expert", str(expert), "--to", there)
            epochs.append(cluster.status()["controller"]["epoch"])
            plan["target"][1]["hosts"] = [there]
            path = tmp_path / "plan.json"
            path.write_text(json.dumps(plan))
            herd(cluster, "apply", str(path))
            herd(cluster, "rollback", str(epochs[0]))
            back = json.loads(herd(cluster, "plan", "--dry-run", "--json"))["target"]
            assert (back[0]["hosts"], len(back)) == (here, len(plan["target"]))
            victim = next(host for host in cluster.status()["hosts"] if host["name"] == "host-3")
            herd(cluster, "drain", "host-3")
            until("the drained process ends", lambda: not is_alive(victim["pid"]))
            status = cluster.status()
            assert [host["name"] for host in status["hosts"]] == ["host-0", "host-1", "host-2"]
            assert status["replicas_held"] == status["replicas_wanted"] and not status["problems"]
            assert epochs[0] < epochs[1] < status["controller"]["epoch"]
            herd(cluster, "scale", "--hosts", "4")
            added = next(host for host in cluster.status()["hosts"] if host["name"] == "host-4")
            assert added["slots"] == added["slots_target"] > 0
            until("the added host computes rows", lambda: cluster.status()["hosts"][-1]["rows_total"] > 0)
        finally:
            changed.set()
        assert all(stream.result() for stream in streams)
    history = json.loads(herd(cluster, "plan", "--history", "--json"))
    assert sum(entry["is_undone"] for entry in history) >= 3


def herd(cluster: Cluster, *arguments: str) -> str:
    """What the command prints; it must succeed."""
    environment = {**os.environ, **state_env(cluster.state_dir)}
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *arguments], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout
