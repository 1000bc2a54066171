"""`herd move`, `drain`, `apply`, `rollback` and `plan`: asked of the controller, and waited for."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cluster.config import check_url
from cluster.control.fleet import Load
from cluster.control.prometheus_load import PrometheusLoad
from cluster.control.reading import Expected, Held, Page
from cluster.place.trace import read_mean, record
from cluster.run_file import state_dirs
from cluster.show import Found, find_controller, table
from experts.errors import ControllerUnreachable, InvalidInput
from experts.grpc_control import (
    ask_host_drain,
    ask_hosts,
    ask_move,
    ask_plan,
    ask_rollback,
    ask_target,
    fetch_history,
    fetch_rows,
    fetch_status,
)
from experts.placement import ExpertKey
from experts.reports import AppliedPlan, ClusterStatus

WAIT_S = 600.0
POLL_S = 0.3
STARTING_S = 10.0
"""A controller that was just started anew hears of its hosts first."""
PROMETHEUS_TRIES = 4
MAX_PLAN_BYTES = 64 << 20
MAX_HOSTS = 4096

Answer = TypeVar("Answer")


def run_move(options: argparse.Namespace) -> int:
    for name in ("layer", "expert"):
        if not 0 <= getattr(options, name) < 1 << 32:
            raise InvalidInput(name, getattr(options, name), "must be a number of at least 0")
    key = (options.layer, options.expert)
    return _ask(options, lambda found: ask_move(found.address, key, options.to, tls=found.tls))


def run_drain(options: argparse.Namespace) -> int:
    return _ask(options, lambda found: ask_host_drain(found.address, options.host, tls=found.tls))


def run_scale(options: argparse.Namespace) -> int:
    number = options.hosts
    if not 1 <= number <= MAX_HOSTS:
        raise InvalidInput("hosts", number, f"must be between 1 and {MAX_HOSTS}")
    found = _find(options)
    _, epoch = _patiently(lambda: ask_hosts(found.address, number, tls=found.tls))
    here = sum(host.transport == "grpc" for host in found.status.hosts)
    print(f"herd: {number} hosts from now on, of {here}; the placement is that of epoch {epoch} now", flush=True)
    return (
        0 if options.no_wait else _wait(found, lambda status: _serving(status) >= min(number, status.replicas_wanted))
    )


def _serving(status: ClusterStatus) -> int:
    """Hosts that have experts, and all that they shall have."""
    return sum(host.state == "ready" and host.slots > 0 for host in status.hosts)


def run_apply(options: argparse.Namespace) -> int:
    target = read_target(Path(options.plan))
    return _ask(options, lambda found: ask_target(found.address, target, tls=found.tls))


def run_rollback(options: argparse.Namespace) -> int:
    if options.epoch is not None and not 0 <= options.epoch < 1 << 63:
        raise InvalidInput("epoch", options.epoch, "must be a number of at least 0")
    return _ask(options, lambda found: ask_rollback(found.address, options.epoch, tls=found.tls))


def run_plan(options: argparse.Namespace) -> int:
    load = read_mean(Path(options.load)) if options.load is not None else None
    if options.prometheus is not None:
        check_url("prometheus", options.prometheus)
    found = _find(options)
    if options.history:
        plans = fetch_history(found.address, tls=found.tls)
        print(json.dumps([_as_json(plan) for plan in plans], indent=1) if options.json else _history(plans))
        return 0
    if options.prometheus is not None:
        load = read_prometheus(found, options.prometheus)
    apply, tls = not options.dry_run, found.tls
    text, document = _patiently(lambda: ask_plan(found.address, apply=apply, load=load, tls=tls))
    print(document if options.json else text)
    return 0


def read_prometheus(found: Found, url: str) -> Mapping[ExpertKey, float]:
    """Rows per second of every expert, as the server at `url` has them. Raises InvalidInput where it has no load that
    could be acted upon, and ControllerUnreachable."""
    _, keys = fetch_rows(found.address, tls=found.tls)
    status = found.status
    expected = Expected(
        keys=keys,
        hosts=tuple(Page(name=host.name, address=host.metrics_address) for host in status.hosts if host.slots),
        routers=tuple(Page(name=router.name, address=router.metrics_address) for router in status.routers),
    )
    source = PrometheusLoad(url, status.name)
    # Where pages are scraped rarely its window becomes wider each time.
    for _ in range(PROMETHEUS_TRIES):
        load = source.load(expected, time.monotonic())
        if isinstance(load, Load):
            break
    if isinstance(load, Held):
        raise InvalidInput("prometheus", url, f"must have a load to plan by: {load.reason}")
    return load.rows


def run_record(options: argparse.Namespace) -> int:
    if not 0.5 <= options.interval <= 3600.0:
        raise InvalidInput("interval", options.interval, "must be between 0.5 and 3600 seconds")
    if options.seconds is not None and not options.interval <= options.seconds <= 1e9:
        raise InvalidInput("seconds", options.seconds, "must be at least an interval")
    return record(_find(options), Path(options.file), options.interval, options.seconds)


def read_target(path: Path) -> dict[ExpertKey, tuple[str, ...]]:
    """The target of a plan as `herd plan --json` prints it. Raises InvalidInput."""
    rule = 'must be {"target": [{"layer": L, "expert": E, "hosts": ["HOST", …]}, …]}'
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise InvalidInput("plan", str(path), f"must be of at most {MAX_PLAN_BYTES} bytes")
        entries = json.loads(path.read_text(encoding="utf-8"))["target"]
        target = {_key(entry): _names(entry["hosts"]) for entry in entries}
    except OSError as error:
        raise InvalidInput("plan", str(path), f"must be a file that can be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput("plan", str(path), rule) from None
    if len(target) < len(entries):
        raise InvalidInput("plan", str(path), "must name every expert once")
    return target


def _key(entry: Any) -> ExpertKey:
    layer, expert = entry["layer"], entry["expert"]
    if not (type(layer) is int and type(expert) is int and 0 <= layer < 1 << 32 and 0 <= expert < 1 << 32):
        raise ValueError("no layer and expert")
    return layer, expert


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name.isprintable() for name in value):
        raise ValueError("no hosts")
    return tuple(value)


def _find(options: argparse.Namespace) -> Found:
    files = (options.tls_cert or "", options.tls_key or "", options.tls_ca or "")
    return find_controller(options.control, state_dirs(os.environ), files)


def _ask(options: argparse.Namespace, call: Callable[[Found], tuple[int, int]]) -> int:
    found = _find(options)
    loads, epoch = _patiently(lambda: call(found))
    print(f"herd: {loads} replicas to load; the placement is that of epoch {epoch} now", flush=True)
    if options.no_wait:
        return 0
    return _wait(found)


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """What `ask` returns, asked again for a while when the controller is starting."""
    end = time.monotonic() + STARTING_S
    while True:
        try:
            return ask()
        except InvalidInput as error:
            if (error.field, error.value) != ("controller", "starting") or time.monotonic() >= end:
                raise
            time.sleep(POLL_S)


def _wait(found: Found, is_done: Callable[[ClusterStatus], bool] = lambda status: True) -> int:
    """Until everything is where it shall be; 1 when something was given up on the way."""
    end = time.monotonic() + WAIT_S
    status = found.status
    while time.monotonic() < end:
        status = _status(found) or status
        placing = status.placement
        if placing.given_up_total > found.status.placement.given_up_total:
            print(f"herd: given up: {'; '.join(status.problems) or 'see the log of the controller'}")
            return 1
        if not placing.is_moving and status is not found.status and is_done(status):
            print(f"herd: done; the placement is that of epoch {status.controller.epoch}")
            return 0
        time.sleep(POLL_S)
    print(f"herd: not done within {WAIT_S:.0f} s: {'; '.join(status.problems) or 'it goes on'}")
    return 1


def _status(found: Found) -> ClusterStatus | None:
    """None while the controller is away: it goes on where it was."""
    try:
        return fetch_status(found.address, tls=found.tls)
    except ControllerUnreachable:
        return None


def _history(plans: list[AppliedPlan]) -> str:
    rows = [("age", "epoch", "loads", "MB", "before", "predicted", "realised", "took", "why")]
    for plan in plans:
        rows.append(
            (
                f"{plan.age_s:.0f} s",
                str(plan.epoch),
                str(plan.loads),
                f"{plan.moved_bytes / 1e6:.1f}",
                _share(plan.before),
                _share(plan.predicted),
                _share(plan.realised),
                "-" if plan.took_s is None else f"{plan.took_s:.1f} s",
                f"{plan.why}{' (undone)' if plan.is_undone else ''}",
            )
        )
    return "\n".join(table(rows)) if plans else "no plan was applied yet"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _as_json(plan: AppliedPlan) -> dict[str, object]:
    return dict(vars(plan))
