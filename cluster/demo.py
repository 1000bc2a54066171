"""The demo: a tiny checkpoint served by a real cluster, asked, hurt and asked again, with what ran where.

It drives `herd serve` from outside like any user: HTTP for questions, `herd status` for processes, metrics for rows.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from cluster.tiny import make_tiny
from experts.config import load_config
from router.prompt.images.canvas import lay_out
from router.prompt.images.processor_config import read_settings

QUESTIONS = (
    "Tell me about a herd of llamas.",
    "What is in this picture?",
    "And what happens when one of them runs away?",
)
PICTURE_SIZE = (150, 100)
MAX_TOKENS = 48
READY_LINE = "herd: ready"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


def run_demo() -> int:
    """Run the whole demo; 0 when everything that it promises happened."""
    with tempfile.TemporaryDirectory(prefix="herd-demo-") as folder:
        model_dir = Path(folder) / "tiny-scout"
        say("1. Making a tiny Llama 4 Scout: same architecture, random weights.")
        make_tiny("scout", model_dir)
        size = sum(file.stat().st_size for file in model_dir.iterdir())
        print(f"   {model_dir.name}: {size / 1e6:.1f} MB, its weights are random, so the words below are noise.")
        say("2. Serving it: one router, two expert hosts, rows between them over gRPC, all on a local Ray.")
        with serving(model_dir, free_port()) as server:
            return converse(server)


def converse(server: Server) -> int:
    """Ask, kill a host, ask again."""
    before = server.status()
    print_processes(before)
    say(f"3. Asking over HTTP: {QUESTIONS[0]!r}")
    first = server.ask(QUESTIONS[0])
    say("4. Which host computed how many rows of which layer (from the hosts' metrics):")
    print_rows(server.rows(before))
    say(f"5. Drawing a PNG of {PICTURE_SIZE[0]} x {PICTURE_SIZE[1]} pixels and asking: {QUESTIONS[1]!r}")
    second = server.ask(QUESTIONS[1], draw_png())
    print(f"   The picture was cut into {describe_tiles(server.model_dir)}.")
    victim = before["hosts"][0]
    say(f"6. kill -9 {victim['name']} (pid {victim['pid']}), then asking again: {QUESTIONS[2]!r}")
    os.kill(victim["pid"], signal.SIGKILL)
    third = server.ask(QUESTIONS[2])
    after = server.status()
    print_processes(after)
    restarted = [host["pid"] for host in after["hosts"] if host["name"] == victim["name"]]
    print(f"   {victim['name']} was pid {victim['pid']} and is pid {restarted[0] if restarted else 'gone'} now.")
    say("7. Shutting down.")
    return 0 if all(answer.num_tokens == MAX_TOKENS for answer in (first, second, third)) else 1


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one streamed answer was like. Times in seconds."""

    num_tokens: int
    first_token_s: float
    tokens_per_s: float


class Server:
    """A running `herd serve`, seen from outside."""

    def __init__(self, model_dir: Path, port: int) -> None:
        self.model_dir = model_dir
        self._port = port

    def ask(self, question: str, png: bytes | None = None) -> Answer:
        """Stream a greedy answer to the screen, to a question with or without a picture."""
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if png is not None:
            url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        body = {
            "model": self.model_dir.name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        started = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"the server answered {response.status}: {response.read(2000).decode()}")
        sys.stdout.write("   ")
        first, num_tokens = 0.0, 0
        for chunk in events(response):
            for choice in chunk["choices"]:
                text = choice["delta"].get("content") or ""
                if text and not first:
                    first = time.perf_counter() - started
                sys.stdout.write("".join(c if c.isprintable() else " " for c in text))
                sys.stdout.flush()
            num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
        total = time.perf_counter() - started
        connection.close()
        speed = (num_tokens - 1) / (total - first)
        print(f"\n   {num_tokens} tokens; first after {first * 1e3:.0f} ms, then {speed:.0f} tokens/s")
        return Answer(num_tokens=num_tokens, first_token_s=first, tokens_per_s=speed)

    def status(self) -> dict[str, Any]:
        """What `herd status --json` says."""
        command = [sys.executable, "-m", "cluster", "status", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def rows(self, status: dict[str, Any]) -> Counter[tuple[int, str]]:
        """Rows computed per (layer, host), read off the metrics page of every host."""
        rows: Counter[tuple[int, str]] = Counter()
        for host in status["hosts"]:
            with urllib.request.urlopen(f"http://{host['metrics_address']}/metrics", timeout=10) as page:
                for line in page.read().decode().splitlines():
                    found = re.match(r"herd_expert_rows_total\{([^}]*)\} ([0-9.e+]+)", line)
                    if found:
                        labels = dict(re.findall(r'(\w+)="([^"]*)"', found[1]))
                        rows[int(labels["layer"]), labels["host"]] += int(float(found[2]))
        return rows


@contextlib.contextmanager
def serving(model_dir: Path, port: int) -> Iterator[Server]:
    """`herd serve` with two hosts, ready when this yields, ended by Ctrl-C's signal and gone when it returns."""
    command = [
        sys.executable, "-m", "cluster", "serve", str(model_dir),
        "--hosts", "2", "--transport", "grpc", "--port", str(port), "--kv-memory", "256MiB",
    ]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    ready = threading.Event()
    echo = threading.Thread(target=echo_lines, args=(process, ready))
    echo.start()
    try:
        await_ready(process, ready)
        yield Server(model_dir, port)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise SystemExit(f"herd serve did not end within {STOP_TIMEOUT_S:.0f} s") from None
        echo.join()
        if code != 0:
            raise SystemExit(f"herd serve ended with code {code}")


def echo_lines(process: subprocess.Popen[str], ready: threading.Event) -> None:
    """Show what the server prints, and notice when it says that it is ready."""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"   {line}", end="", flush=True)
        if line.startswith(READY_LINE):
            ready.set()


def await_ready(process: subprocess.Popen[str], ready: threading.Event) -> None:
    """Wait until the server says so. Ends the demo when the server ends first or takes too long."""
    give_up = time.monotonic() + START_TIMEOUT_S
    while not ready.wait(timeout=0.2):
        if process.poll() is not None:
            raise SystemExit(f"herd serve ended with code {process.returncode} before it was ready")
        if time.monotonic() > give_up:
            raise SystemExit(f"herd serve was not ready within {START_TIMEOUT_S:.0f} s")


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if not line.startswith(b"data: ") or data == b"[DONE]":
            continue
        chunk: dict[str, Any] = json.loads(data)
        if "error" in chunk:
            raise SystemExit(f"the stream ended in an error: {chunk['error']['message']}")
        yield chunk


def print_processes(status: dict[str, Any]) -> None:
    """One line per process of the cluster."""
    print(f"   controller        pid {status['controller']['pid']:<8} placement epoch {status['controller']['epoch']}")
    for ingress in status["ingress"]:
        print(f"   ingress           pid {ingress['pid']:<8} {ingress['http']}")
    for router in status["routers"]:
        print(f"   router            pid {router['pid']:<8} {router['state']}")
    for host in status["hosts"]:
        about = f"{host['state']}, {host['slots']} experts in slots, {host['rows_total']} rows computed"
        print(f"   {host['name']:<17} pid {host['pid']:<8} {about}")


def print_rows(rows: Counter[tuple[int, str]]) -> None:
    """A table: layers down, hosts across."""
    hosts = sorted({host for _, host in rows})
    print("   layer " + "".join(f"{host:>10}" for host in hosts))
    for layer in sorted({layer for layer, _ in rows}):
        print(f"   {layer:>5} " + "".join(f"{rows[layer, host]:>10}" for host in hosts))


def draw_png() -> bytes:
    """A sunset: a sky that fades, a sun, a hill."""
    width, height = PICTURE_SIZE
    picture = Image.linear_gradient("L").resize(PICTURE_SIZE)
    picture = Image.merge("RGB", (picture, picture.point(lambda v: v // 2), Image.new("L", PICTURE_SIZE, 90)))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((width * 0.6, height * 0.25, width * 0.8, height * 0.55), fill=(255, 220, 120))
    draw.polygon([(0, height), (width // 3, height // 2), (width, height)], fill=(20, 60, 30))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def describe_tiles(model_dir: Path) -> str:
    """What the processor's rules make of the picture."""
    vision = load_config(model_dir).vision
    assert vision is not None
    layout = lay_out(*PICTURE_SIZE, read_settings(model_dir, vision))
    whole = " and the whole picture once more, small" if layout.num_tiles > layout.rows * layout.cols else ""
    return f"{layout.num_tiles} tiles of {vision.tile_size} pixels: {layout.rows} x {layout.cols}{whole}"


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def free_port() -> int:
    """A TCP port that nobody on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
