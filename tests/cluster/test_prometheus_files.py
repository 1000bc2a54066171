"""deploy/prometheus: rules that Prometheus accepts, alerts that fire when they should, and a runbook for each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from exported_metrics import exported, metrics_in
from real_prometheus import needs_promtool, promtool

from cluster.cli import _parser
from cluster.controller_process import TARGETS_PATH

DEPLOY = Path(__file__).parents[2] / "deploy"
FOLDER = DEPLOY / "prometheus"


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in read(name)["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
RECORDED = {rule["record"] for rule in rules("recording.yml")}


@needs_promtool
def test_promtool_accepts_configuration_and_rules() -> None:
    promtool("check", "config", "prometheus.yml", cwd=FOLDER)
    promtool("check", "rules", "recording.yml", "alerts.yml", cwd=FOLDER)


@needs_promtool
def test_rules_do_what_their_tests_say() -> None:
    promtool("test", "rules", "rules_test.yml", cwd=FOLDER)


def test_every_alert_is_seen_firing_and_seen_quiet() -> None:
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    for test in read("rules_test.yml")["tests"]:
        for check in test["alert_rule_test"]:
            seen[bool(check.get("exp_alerts"))].add(check["alertname"])
    assert seen[True] == seen[False] == set(ALERTS)


def test_the_file_sd_variant_in_the_comment_is_one_that_prometheus_accepts(tmp_path: Path) -> None:
    text = (FOLDER / "prometheus.yml").read_text()
    assert f":7400{TARGETS_PATH}" in text
    on = re.sub(r"^( *)# ((?:  )*(?:file_sd_configs:|- files:|refresh_interval:))", r"\1\2", text, flags=re.M)
    off = re.sub(r"^ *http_sd_configs:\n.*\n.*\n", "", on, flags=re.M)
    job = yaml.safe_load(off)["scrape_configs"][0]
    assert "http_sd_configs" not in job
    assert job["file_sd_configs"][0]["files"] == ["/var/lib/herd/targets.json"]


@pytest.mark.parametrize(
    "rule", [*ALERTS.values(), *rules("recording.yml")], ids=lambda rule: rule.get("alert", "record")
)
def test_rules_read_only_what_pages_export(rule: dict[str, Any]) -> None:
    names = metrics_in(rule["expr"])
    assert names, "else it reads nothing of ours"
    assert names <= exported() | RECORDED | {"up"}


SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (DEPLOY / "RUNBOOK.md").read_text(), re.M | re.S))


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_leads_to_a_section_that_names_a_command(alert: str) -> None:
    file, _, anchor = ALERTS[alert]["annotations"]["runbook_url"].partition("#")
    assert file == "deploy/RUNBOOK.md"
    section = next((text for title, text in SECTIONS.items() if slug(title) == anchor), "")
    assert section, f"no section has the anchor {anchor}"
    todo = section.partition("\nDo: ")[2]
    commands = re.findall(r"`herd ([a-z-]+)([^`]*)`", todo)
    known = _parser("0")._subparsers._group_actions[0].choices
    assert commands, "what to run is not said"
    for command, flags in commands:
        assert command in known
        text = known[command].format_help()
        assert all(flag in text for flag in re.findall(r"--[a-z-]+", flags))


def slug(title: str) -> str:
    """As Markdown pages name the anchors of their headings."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
