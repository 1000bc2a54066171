"""`herd serve --deterministic` answers to the bit what the engine answers in one process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from compiled import Threads
from deterministic import Answer, Ask, Desk, deterministic_decoder, open_deterministic
from serving import ANSWER_S, Cluster, serving

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
