"""The status of a cluster for people and for programs, wherever its controller is found."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.run_file import read_run_files
from experts.errors import ControllerUnreachable
from experts.grpc_control import fetch_status
from experts.reports import ClusterStatus
from experts.tls import Identity, load_identity

TIMEOUT_S = 3.0
RESTART_S = 4.0
"""A controller that was killed is back within this."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A controller that answered: where, to whom, and what it said."""

    status: ClusterStatus
    address: str
    tls: Identity | None


def find_status(
    control: str | None, folders: tuple[Path, ...], tls_files: tuple[str, str, str] = ("", "", "")
) -> ClusterStatus:
    """What `find_controller` finds says."""
    return find_controller(control, folders, tls_files).status


def find_controller(
    control: str | None, folders: tuple[Path, ...], tls_files: tuple[str, str, str] = ("", "", "")
) -> Found:
    """Ask the controller at `control`, or the one of the newest run file in `folders` that answers.

    `tls_files`: certificate, key and CA; empty: those that the run file names. Raises ControllerUnreachable and
    InvalidInput.
    """
    identity = load_identity(*tls_files)
    if control:
        return Found(status=fetch_status(control, TIMEOUT_S, identity), address=control, tls=identity)
    end = time.monotonic() + RESTART_S
    while files := list(read_run_files(folders)):
        for file in files:
            with contextlib.suppress(ControllerUnreachable):
                tls = identity or file.identity()
                return Found(status=fetch_status(file.control, TIMEOUT_S, tls), address=file.control, tls=tls)
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    raise ControllerUnreachable("", "no cluster of this user runs on this machine; --control names one elsewhere")


def as_json(status: ClusterStatus) -> dict[str, Any]:
    """Plain values under stable names."""
    return {
        "name": status.name,
        "controller": asdict(status.controller),
        "ingress": [asdict(ingress) for ingress in status.ingresses],
        "routers": [asdict(router) for router in status.routers],
        "hosts": [asdict(host) for host in status.hosts],
        "replicas_held": status.replicas_held,
        "replicas_wanted": status.replicas_wanted,
        "draining": status.draining,
        "problems": list(status.problems),
        "placement": {
            "rebalances": status.placement.rebalances,
            "held_by": status.placement.held_by,
            "is_moving": status.placement.is_moving,
            "loading": status.placement.loading,
            "draining": status.placement.draining,
            "loaded_total": status.placement.loaded_total,
            "given_up_total": status.placement.given_up_total,
            "predicted": status.placement.predicted,
            "realised": status.placement.realised,
        },
    }


def as_text(status: ClusterStatus) -> str:
    """One screen."""
    controller = status.controller
    lines = [
        f"cluster {status.name}: placement epoch {controller.epoch}, "
        f"{status.replicas_held} of {status.replicas_wanted} expert replicas held"
        + (", draining" if status.draining else ""),
        "",
    ]
    rows = [("process", "node", "pid", "address", "state", "about")]
    rows.append(("controller", controller.node, str(controller.pid), controller.address, "ready", ""))
    for ingress in status.ingresses:
        rows.append((ingress.name, ingress.node, str(ingress.pid), ingress.http, "ready", ""))
    for router in status.routers:
        load = f"{router.running} running, {router.waiting} waiting"
        rows.append((router.name, router.node, str(router.pid), router.address, router.state, load))
    for host in status.hosts:
        held = f"{host.slots} of {host.slots_target} experts, {host.rows_total} rows"
        rows.append((host.name, host.node, str(host.pid), host.address or host.transport, host.state, held))
    lines += table(rows)
    lines += ["", kv_line(status)] if status.routers else []
    lines += [_load_line(status)] if status.placement.rebalances and status.hosts else []
    if status.placement.is_moving:
        lines += ["", f"moving: {status.placement.loading} replicas load, {status.placement.draining} drain"]
    lines += ["", *(f"problem: {problem}" for problem in status.problems)] if status.problems else []
    return "\n".join(lines)


def _load_line(status: ClusterStatus) -> str:
    """Where the load is read, and what keeps it from moving experts."""
    where = status.controller.prometheus or "the processes' pages"
    held_by = status.placement.held_by
    return f"load: read from {where}{f'; nothing is moved for it: {held_by}' if held_by else ''}"


def kv_line(status: ClusterStatus) -> str:
    """What fits into the KV caches of the routers that report; routers are alike, and the least of them is told."""
    tokens = min((router.kv_tokens for router in status.routers), default=0)
    longest = min((router.max_model_len for router in status.routers), default=0)
    return f"KV cache: {tokens:,} tokens on each router, up to {longest:,} of one request"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
