"""`herd drill`: finds the cluster, runs the drills, prints verdicts; the exit code tells whether budgets were kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from cluster.drill.drill import Drill, DrillFailed, DrillSettings
from cluster.drill.faults import Kind
from cluster.drill.hot_set import ShiftSettings, bench_shift
from cluster.drill.table import lines_of
from cluster.drill.verdict import Verdict
from cluster.load.client import Client
from cluster.load.server import ServerFacts, look_at
from cluster.load.settings import LoadSettings
from cluster.measure.report import print_results
from cluster.run_file import read_run_files
from cluster.show import TIMEOUT_S, find_controller, find_status
from cluster.version import herd_version
from experts.errors import InvalidInput
from experts.grpc_control import ask_cut, fetch_rows, fetch_status
from experts.reports import ClusterStatus

BROKEN = 1
ALL = "all"


def parse_kinds(text: str) -> list[Kind]:
    """The drills of "kill-host,hang-host" or "all". Raises InvalidInput."""
    if text == ALL:
        return list(Kind)
    names = [name.strip() for name in text.split(",")]
    known = {kind.value for kind in Kind}
    for name in names:
        if name not in known:
            raise InvalidInput("drill", name, f"must be {ALL} or some of {', '.join(sorted(known))}")
    return [Kind(name) for name in names]


def run_drills(
    kinds: Sequence[Kind], control: str | None, state_dirs: tuple[Path, ...], asked: dict[str, Any], out: str | None
) -> int:
    """Run `kinds` against the cluster at `control` or the newest one here; `out` also gets JSON ("-": nothing else).

    `asked` are fields of DrillSettings. Raises InvalidInput, ControllerUnreachable and DrillFailed.
    """
    status = find_status(control, state_dirs)
    address = status.controller.address
    identity = next((file.identity() for file in read_run_files(state_dirs) if file.control == address), None)
    url, facts = _served(status)
    settings = DrillSettings(**asked, url=url, model=facts.model)
    drill = Drill(
        settings=settings,
        token_ids=facts.vocabulary.ids,
        # A controller comes back at the address that it had.
        ask=lambda: fetch_status(address, TIMEOUT_S, identity),
        cut=lambda host, seconds: ask_cut(address, host, seconds, TIMEOUT_S, identity),
    )
    verdicts = asyncio.run(drill.run(kinds, partial(_show, quiet=out == "-")))
    if out is not None:
        _write(out, settings, status, verdicts)
    return BROKEN if any(verdict.broken for verdict in verdicts) else 0


def run_shift(control: str | None, state_dirs: tuple[Path, ...], asked: dict[str, Any], out: str | None) -> int:
    """Shift the load of the cluster at `control` or of the newest one here. `asked` are fields of ShiftSettings."""
    found = find_controller(control, state_dirs)
    url, facts = _served(found.status)
    settings = ShiftSettings(**asked, url=url, model=facts.model)
    fetch = partial(fetch_rows, found.address, TIMEOUT_S, found.tls)
    print_results([asyncio.run(bench_shift(settings, facts.vocabulary.ids, fetch))], out)
    return 0


def _served(status: ClusterStatus) -> tuple[str, ServerFacts]:
    if not status.ingresses:
        raise DrillFailed("the cluster has no ingress")
    url = status.ingresses[0].http
    return url, asyncio.run(_look(LoadSettings(url=url)))


async def _look(settings: LoadSettings) -> ServerFacts:
    async with Client(settings) as client:
        return await look_at(client, settings)


def _show(verdict: Verdict, *, quiet: bool) -> None:
    if not quiet:
        print("\n".join(lines_of(verdict)), flush=True)


def _write(out: str, settings: DrillSettings, status: ClusterStatus, verdicts: Sequence[Verdict]) -> None:
    document = {
        "version": herd_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "cluster": {"routers": len(status.routers), "hosts": len(status.hosts), "ingresses": len(status.ingresses)},
        "drills": [asdict(verdict) for verdict in verdicts],
    }
    text = json.dumps(document, indent=2)
    if out == "-":
        print(text)
    else:
        Path(out).write_text(text + "\n")
