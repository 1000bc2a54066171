"""A cluster started and stopped through the front door, and its answers judged by transformers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoConfig, AutoTokenizer, Llama4ForConditionalGeneration

from cluster.processes import is_alive

NEAR_TIE = 1e-4
START_S, STOP_S, ANSWER_S = 300.0, 90.0, 180.0


def free_port() -> int:
    """A port that nobody has, below those that the system gives to connections: none of these takes it meanwhile."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def until(what: str, look: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """The first true thing that `look` returns; a clear failure when there is none in time."""
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        seen = look()
        if seen:
            return seen
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s:.0f} s: {what}")


@dataclass(frozen=True, kw_only=True)
class FrontDoor:
    """Where a model is asked."""

    url: str
    model: str

    def complete(self, prompt: Sequence[int], max_tokens: int) -> str:
        """A greedy completion of token ids, streamed; end tokens are ignored so that its length is known."""
        body = {
            "model": self.model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        parts, finished = [], []
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=ANSWER_S) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    for choice in chunk["choices"]:
                        parts.append(choice["text"])
                        finished += [choice["finish_reason"]] if choice["finish_reason"] else []
        assert finished == ["length"], finished
        return "".join(parts)

    def complete_all(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]) -> list[str]:
        """All of them at the same time."""
        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(self.complete, prompts, max_tokens))


@dataclass(frozen=True, kw_only=True)
class Cluster(FrontDoor):
    """A running `herd serve`."""

    process: subprocess.Popen[bytes]
    state_dir: Path

    def status(self) -> dict[str, Any]:
        """What `herd status --json` says; an empty object while the controller does not answer."""
        command = [sys.executable, "-m", "cluster", "status", "--json"]
        done = subprocess.run(
            command, capture_output=True, timeout=60, check=False, env={**os.environ, **state_env(self.state_dir)}
        )
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def pids(self) -> set[int]:
        """Of all processes that the controller knows, itself among them."""
        status = until("the controller answers", self.status)
        members = [process["pid"] for kind in ("hosts", "routers", "ingress") for process in status[kind]]
        return {status["controller"]["pid"], *members}


def state_env(state_dir: Path) -> dict[str, str]:
    return {"XDG_RUNTIME_DIR": str(state_dir)}


@contextlib.contextmanager
def serving(model_dir: Path, state_dir: Path, *flags: str) -> Iterator[Cluster]:
    """`herd serve MODEL_DIR FLAGS`, ready; afterwards asked to end with SIGTERM, and seen to end well and to leave
    nothing behind. `state_dir` is its own."""
    state_dir.mkdir(exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "cluster", "serve", str(model_dir), "--port", str(port), *flags]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, **state_env(state_dir)})
    cluster = Cluster(process=process, url=f"http://127.0.0.1:{port}", model=model_dir.name, state_dir=state_dir)
    try:
        until("herd serve is ready", lambda: is_ready(cluster), START_S)
        yield cluster
        pids = cluster.pids()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert code == 0, f"herd serve ended with code {code}"
    until("every process has ended", lambda: not any(is_alive(pid) for pid in pids))
    assert not [path for path in state_dir.rglob("*") if path.is_file()], "files are left behind"


def is_ready(cluster: Cluster) -> bool:
    assert cluster.process.poll() is None, f"herd serve ended with code {cluster.process.returncode}"
    try:
        return httpx.get(f"{cluster.url}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


class Judge:
    """Knows what transformers answers from the same folder, and where rounding may decide otherwise."""

    def __init__(self, model_dir: Path) -> None:
        config = AutoConfig.from_pretrained(model_dir)
        # transformers cannot run a null chunk, which means "no chunks".
        config.text_config.attention_chunk_size = config.text_config.attention_chunk_size or 1 << 20
        self._model = Llama4ForConditionalGeneration.from_pretrained(
            model_dir, config=config, attn_implementation="eager"
        ).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._known: dict[tuple[int, ...], list[int]] = {}
        self.accepted = 0

    def check(self, prompt: Sequence[int], max_tokens: int, answer: str, pixels: torch.Tensor | None = None) -> None:
        """The answer is the reference's greedy one, or differs only where the reference itself was nearly tied."""
        expected = self.greedy(prompt, max_tokens, pixels)
        text = self._tokenizer.decode(expected, skip_special_tokens=True)
        if answer == text:
            return
        gap = self.smallest_gap([*prompt, *expected], pixels)
        assert gap < NEAR_TIE, f"answer differs and no choice was nearly tied ({gap}):\n{answer!r}\n{text!r}"
        self.accepted += 1

    def greedy(self, prompt: Sequence[int], max_tokens: int, pixels: torch.Tensor | None) -> list[int]:
        """Answers to words alone are remembered."""
        if pixels is not None:
            return self._generate(prompt, max_tokens, pixels)
        known = self._known.get(tuple(prompt), [])
        if len(known) < max_tokens:
            known = self._known[tuple(prompt)] = self._generate(prompt, max_tokens)
        return known[:max_tokens]

    @torch.no_grad()
    def _generate(self, prompt: Sequence[int], max_tokens: int, pixels: torch.Tensor | None = None) -> list[int]:
        output = self._model.generate(
            torch.tensor([list(prompt)]),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            **({} if pixels is None else {"pixel_values": pixels}),
        )
        return [int(token) for token in output[0, len(prompt) :]]

    @torch.no_grad()
    def smallest_gap(self, ids: Sequence[int], pixels: torch.Tensor | None) -> float:
        """The smallest distance between first and second choice, of any gate or of the next token."""
        output = self._model(
            input_ids=torch.tensor([list(ids)]), pixel_values=pixels, output_router_logits=True, use_cache=False
        )
        gates = [logits for logits in output.router_logits or () if torch.is_tensor(logits)]
        tops = [logits.reshape(-1, logits.shape[-1]).topk(2).values for logits in (output.logits, *gates)]
        return min(float((top[:, 0] - top[:, 1]).min()) for top in tops)
