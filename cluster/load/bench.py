"""`herd bench serve`: puts a load on a server and reports what a client sees of it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.cpu_account import CpuUse, Part, cpu_seconds, outside_engine, parts_of, used_between
from cluster.load.client import Client
from cluster.load.drive import Collected, drive, interruptible
from cluster.load.pictures import draw_png
from cluster.load.report import LoadReport, summarize
from cluster.load.server import ServerFacts, look_at
from cluster.load.settings import LoadSettings
from cluster.load.table import as_text
from cluster.load.workloads import asks, body
from cluster.progress import Progress
from cluster.result_file import STANDARD_OUTPUT, check_result_file, write_result
from cluster.run_file import read_run_files
from cluster.show import TIMEOUT_S
from cluster.version import herd_version
from experts.errors import ControllerUnreachable, HerdError
from experts.grpc_control import fetch_status

FAILED, INTERRUPTED = 1, 130
CLIENT = "this client"
STATUS_TRIES = 3
"""A busy machine's controller may take its time."""
PREPARED_AT_ONCE = 64
"""Between so many requests somebody may ask for the end."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A load that ran, with the processor time of both sides as far as it can be known."""

    facts: ServerFacts
    started: datetime
    collected: Collected
    cpu: tuple[CpuUse, ...]


def bench_serve(settings: LoadSettings, out: str | None, state_dirs: Sequence[Path]) -> int:
    """Measure and print; `out` also gets JSON ("-": JSON on standard output, and no table). Returns the exit code.

    `state_dirs` is where a cluster on this machine has its run file. Raises InvalidInput and HerdError.
    """
    check_result_file(out)
    progress = Progress(sys.stderr)
    try:
        measured = asyncio.run(_measure(settings, progress, _local_parts(settings.url, state_dirs)))
    finally:
        progress.end()
    report = summarize(measured.collected, settings.goodput)
    document = json.dumps(_document(settings, measured, report), indent=1)
    print(document if out == STANDARD_OUTPUT else as_text(settings, report, measured.cpu))
    if out is not None and out != STANDARD_OUTPUT:
        write_result(out, document)
    if measured.collected.was_interrupted:
        return INTERRUPTED
    return 0 if report.completed else FAILED


async def _measure(settings: LoadSettings, progress: Progress, parts: Sequence[Part]) -> Measured:
    with interruptible() as stop:
        async with Client(settings) as client:
            preparing = asyncio.create_task(_prepare(settings, client))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({preparing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not preparing.done():
                preparing.cancel()
                raise HerdError("stopped before anything was measured")
            facts, bodies = await preparing
            started = datetime.now(UTC)
            before = {**cpu_seconds(parts), CLIENT: time.process_time()}
            show = partial(progress.show, "requests", total=len(bodies))
            collected = await drive(settings, bodies, client.send, lambda count: show(count), stop)
            after = {**cpu_seconds(parts), CLIENT: time.process_time()}
    return Measured(facts=facts, started=started, collected=collected, cpu=used_between(before, after))


async def _prepare(settings: LoadSettings, client: Client) -> tuple[ServerFacts, list[bytes]]:
    """All bodies are made before the load begins: making them takes time that would delay the measured ones."""
    facts = await look_at(client, settings)
    draw = partial(draw_png, settings.image_sides(), seed=settings.seed)
    count, bodies = settings.warmup + settings.requests, list[bytes]()
    for first in range(0, count, PREPARED_AT_ONCE):
        asked = asks(settings, facts.vocabulary, first, min(PREPARED_AT_ONCE, count - first), draw)
        bodies += [json.dumps(body(settings, facts.model, ask)).encode() for ask in asked]
        await asyncio.sleep(0)
    await asyncio.gather(*(client.send(warm) for warm in bodies[: settings.warmup]))
    return facts, bodies[settings.warmup :]


def _local_parts(url: str, state_dirs: Sequence[Path]) -> tuple[Part, ...]:
    """The parts of the cluster behind `url` if it runs on this machine; else none."""
    here = urlsplit(url)
    if here.hostname not in ("127.0.0.1", "localhost", "::1"):
        return ()
    found = [file for file in read_run_files(tuple(state_dirs)) if urlsplit(file.http).port == here.port]
    for file in found * STATUS_TRIES:
        with suppress(ControllerUnreachable):
            return parts_of(fetch_status(file.control, TIMEOUT_S, file.identity()))
    return ()


def _document(settings: LoadSettings, measured: Measured, report: LoadReport) -> dict[str, Any]:
    arguments = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name != "api_key"}
    if settings.request_rate is not None:
        # JSON has no infinity.
        arguments["request_rate"] = str(settings.request_rate)
    return {
        "setup": {
            "herd": herd_version(),
            "commit": _commit(),
            "python": platform.python_version(),
            "aiohttp": importlib.metadata.version("aiohttp"),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "started": measured.started.isoformat(timespec="seconds"),
            "model": measured.facts.model,
            "server_version": measured.facts.version,
        },
        "arguments": arguments,
        "results": asdict(report),
        "cpu_s": {use.part: round(use.cpu_s, 3) for use in measured.cpu},
        "cpu_s_outside_engine": outside_engine(measured.cpu),
    }


def _commit() -> str:
    """The commit of the checkout that this runs from, "" if it runs from none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""
