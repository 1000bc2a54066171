"""The dashboards of deploy/grafana, and their expressions with values in place of Grafana's variables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARDS = tuple(sorted((FOLDER / "dashboards").glob("*.json")))


def dashboard(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions(board: dict[str, Any], cluster: str, interval: str) -> Iterator[tuple[str, str]]:
    """(where, PromQL) of each panel."""
    for panel in panels(board):
        for target in panel["targets"]:
            yield f"{board['title']} / {panel['title']}", filled(target["expr"], cluster, interval)


def annotations(board: dict[str, Any], cluster: str, interval: str) -> Iterator[tuple[str, str]]:
    """The same of the annotations, which say nothing where nothing happens."""
    for one in board["annotations"]["list"]:
        yield f"{board['title']} / {one['name']}", filled(one["expr"], cluster, interval)


def filled(expression: str, cluster: str, interval: str) -> str:
    for variable, value in (("$__rate_interval", interval), ("$cluster", cluster), ("$layer", ".*")):
        expression = expression.replace(variable, value)
    assert "$" not in expression, f"a variable that nobody knows: {expression}"
    return expression
