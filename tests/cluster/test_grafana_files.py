"""deploy/grafana: dashboards whose expressions Prometheus understands, over metrics that there are."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from exported_metrics import exported, metrics_in
from grafana_files import DASHBOARDS, FOLDER, annotations, dashboard, expressions, panels
from real_prometheus import needs_promtool, promtool

BOARDS = [dashboard(path) for path in DASHBOARDS]
ALL = [pair for board in BOARDS for pair in (*expressions(board, "herd", "1m"), *annotations(board, "herd", "1m"))]
RUNBOOK = (FOLDER.parent / "RUNBOOK.md").read_text()


def provisioned(name: str) -> Any:
    return yaml.safe_load((FOLDER / "provisioning" / name / "herd.yml").read_text())


def test_the_provisioning_names_a_source_and_a_folder() -> None:
    (source,) = provisioned("datasources")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    (provider,) = provisioned("dashboards")["providers"]
    assert provider["options"]["path"]


@needs_promtool
def test_prometheus_understands_every_expression(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": text} for number, (_, text) in enumerate(ALL)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(ALL)} rules found" in promtool("check", "rules", "panels.yml", cwd=tmp_path)


@pytest.mark.parametrize(("where", "expression"), ALL, ids=[f"{place}" for place in range(len(ALL))])
def test_expressions_read_only_what_pages_export(where: str, expression: str) -> None:
    names = metrics_in(expression)
    assert names, where
    assert names <= exported(), where


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board["uid"])
def test_a_dashboard_is_one_that_grafana_can_load(board: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert {variable["name"] for variable in board["templating"]["list"]} >= {"datasource", "cluster"}
    for panel in panels(board):
        assert panel["datasource"]["uid"] == "${datasource}", "whatever the data source is called"
        assert panel["description"] and panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        for link in panel.get("links", []):
            anchor = link["url"].partition("deploy/RUNBOOK.md#")[2]
            assert anchor in anchors(), link["url"]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board["uid"])
def test_panels_do_not_lie_over_each_other(board: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_what_an_operator_looks_for_is_there() -> None:
    shown = {
        board["uid"]: {name for _, text in expressions(board, "c", "1m") for name in metrics_in(text)}
        for board in BOARDS
    }
    assert shown["herd-overview"] >= {
        "herd_router_requests_finished_total", "herd_router_output_tokens_total", "herd_router_kv_use_ratio",
        "herd_router_time_to_first_token_seconds_bucket", "herd_router_inter_token_seconds_bucket",
        "herd_router_queue_seconds_bucket", "herd_ingress_responses_total",
    }  # fmt: skip
    assert shown["herd-experts"] >= {
        "herd_expert_rows_total", "herd_expert_replicas", "herd_controller_hosts", "herd_router_hedges_total",
        "herd_planner_balance_ratio", "herd_planner_hosts_wanted",
    }  # fmt: skip
    marks = {name for board in BOARDS for _, text in annotations(board, "c", "1m") for name in metrics_in(text)}
    assert marks >= {"herd_moves_ended_total", "herd_router_failovers_total"}


def anchors() -> set[str]:
    titles = [line.removeprefix("## ") for line in RUNBOOK.splitlines() if line.startswith("## ")]
    return {"".join(c for c in title.lower() if c.isalnum() or c in " -_").replace(" ", "-") for title in titles}
