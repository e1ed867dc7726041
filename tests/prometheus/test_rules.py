"""conf/prometheus: rules that Prometheus takes, alerts that fire when they should, and names that exist."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from delineate.api.app import ROUTES
from delineate.config import load_config
from delineate.telemetry.exposition import Look, QueueLook, render_metrics
from delineate.telemetry.metrics import expect_requests
from tests.promtool import promtool_check, promtool_test_rules

ROOT = Path(__file__).resolve().parent.parent.parent
CONF = ROOT / "conf" / "prometheus"
CASES = Path(__file__).with_name("rules_test.yml")
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()

# Of other programs: what the rules and the runbook ask for, and where its name comes from.
EXPORTED = {
    # https://prometheus.io/docs/concepts/jobs_instances/ and .../configuration/alerting_rules/; its own /metrics
    "Prometheus": {
        "up",
        "ALERTS",
        "prometheus_rule_evaluation_failures_total",
        "prometheus_notifications_errors_total",
    },
    # https://github.com/prometheus/node_exporter: collectors cpu, diskstats, filesystem, loadavg, meminfo, vmstat
    "node-exporter": {
        "node_cpu_seconds_total",
        "node_filesystem_avail_bytes",
        "node_filesystem_readonly",
        "node_filesystem_size_bytes",
        "node_memory_MemAvailable_bytes",
        "node_memory_MemTotal_bytes",
        "node_vmstat_oom_kill",
    },
    # https://github.com/oliver006/redis_exporter, exporter/exporter.go: metricMapGauges, metricMapCounters
    "redis-exporter": {
        "redis_aof_last_write_status",
        "redis_memory_max_bytes",
        "redis_memory_used_bytes",
        "redis_rdb_last_bgsave_status",
        "redis_rejected_connections_total",
    },
    # https://github.com/nginx/nginx-prometheus-exporter, README.md: Common metrics; `addr` comes with a second address
    "nginx-exporter": {"nginx_up"},
    # https://github.com/seaweedfs/seaweedfs, weed/stats/metrics.go: VolumeServerResourceGauge
    "SeaweedFS": {"SeaweedFS_volumeServer_resource"},
    # https://min.io/docs/minio/linux/operations/monitoring/metrics-and-alerts.html: Cluster Capacity Metrics
    "MinIO": {"minio_cluster_capacity_usable_free_bytes", "minio_cluster_capacity_usable_total_bytes"},
}

Rule = dict[str, Any]


def rules_of(name: str) -> list[Rule]:
    return [rule for group in yaml.safe_load((CONF / name).read_text())["groups"] for rule in group["rules"]]


RECORDED, ALERTS = rules_of("recording.yml"), rules_of("alerts.yml")
every_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])


def exposed() -> str:
    """What a container answers to GET /metrics before anything has happened."""
    for route in ROUTES:
        expect_requests(route.method, route.path, (200, 500, 503))
    sizes = dict.fromkeys(("waiting", "active", "delayed", "failed"), 0)
    look = Look(dict.fromkeys(("storage", "redis", "workers"), True), QueueLook(sizes, 0, 1, paused=False))
    text = render_metrics(load_config({}).telemetry, look).decode()
    return text + text.replace('role="api"', 'role="worker"')


def selectors(expression: str) -> Iterable[tuple[str, str]]:
    """Every metric that an expression names, with what is between its braces."""
    without = re.sub(r"#.*", "", expression)
    without = re.sub(r"\b(by|on|ignoring|without)\s*\([^)]*\)", "", without)
    for name, call, matchers in re.findall(r'\b([a-zA-Z_][\w:]*)(\s*\()?(?:\{((?:"[^"]*"|[^}"])*)\})?', without):
        if not call and name not in ("and", "or", "unless", "e") and not re.fullmatch(r"[smhd]", name):
            yield name, matchers


def labels(series: str) -> dict[str, str]:
    return dict(re.findall(r'(\w+)="([^"]*)"', series))


def firings(name: str) -> list[dict[str, str]]:
    """The labels of `name` in the cases where it fires."""
    return [
        labels(sample["labels"])
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["promql_expr_test"]
        for sample in case.get("exp_samples", ())
        if labels(case["expr"])["alertname"] == name
    ]


def test_promtool_accepts_the_rules() -> None:
    for name in ("recording.yml", "alerts.yml"):
        promtool_check("rules", str(CONF / name))


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool_test_rules(str(CASES))


@every_alert
def test_every_alert_has_a_case_that_fires_and_one_that_does_not(alert: Rule) -> None:
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["promql_expr_test"]]
    own = [case for case in cases if case["expr"] == f'ALERTS{{alertname="{alert["alert"]}", alertstate="firing"}}']
    assert {bool(case.get("exp_samples")) for case in own} == {True, False}


def test_every_case_is_of_an_alert() -> None:
    asked = re.findall(r'alertname="(\w+)"', CASES.read_text())
    assert set(asked) == {alert["alert"] for alert in ALERTS}


@every_alert
def test_every_alert_says_what_to_do(alert: Rule) -> None:
    assert alert["labels"].keys() == {"severity"}
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    file, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert (ROOT / file).read_text() == RUNBOOK
    assert anchor == alert["alert"].lower()
    assert f"\n### {alert['alert']}\n" in RUNBOOK


@every_alert
def test_words_of_an_alert_name_labels_that_it_has(alert: Rule) -> None:
    named = set(re.findall(r"\$labels\.(\w+)", str(alert["annotations"])))
    # `instance` is there in Prometheus, not in every case.
    assert named - {"instance"} <= set.intersection(*(set(fired) for fired in firings(alert["alert"])))


def test_the_runbook_has_no_alert_that_does_not_exist() -> None:
    assert re.findall(r"^### (\w+)$", RUNBOOK, re.MULTILINE) == [alert["alert"] for alert in ALERTS]


@pytest.mark.parametrize(
    "expression",
    [rule["expr"] for rule in RECORDED + ALERTS] + re.findall(r"^    prom '(.*)'$", RUNBOOK, re.MULTILINE),
)
def test_every_series_that_is_asked_for_exists(expression: str) -> None:
    samples = [line for line in exposed().splitlines() if not line.startswith("#")]
    foreign = set().union(*EXPORTED.values()) | {rule["record"] for rule in RECORDED}
    found = list(selectors(expression))
    assert found
    for name, matchers in found:
        if name in foreign:
            continue
        own = [labels(line) for line in samples if re.match(rf"{name}[ {{]", line)]
        assert own, f"nobody exposes {name}"
        for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers):
            if label not in ("job", "instance"):
                assert any(matches(one.get(label, ""), operator, value) for one in own), f"{name}: {label}"


def matches(value: str, operator: str, wanted: str) -> bool:
    equal = re.fullmatch(wanted, value) is not None if operator.endswith("~") else value == wanted
    return equal is not operator.startswith("!")


def test_every_foreign_metric_is_used() -> None:
    used = {name for rule in RECORDED + ALERTS for name, _ in selectors(rule["expr"])}
    assert set().union(*EXPORTED.values()) - {"ALERTS"} <= used


def test_thresholds_are_those_of_the_configuration() -> None:
    config = load_config({"DELINEATE_ENV": "production"}, ROOT / "conf")
    text = (CONF / "alerts.yml").read_text()
    assert f"> 0.8 * {config.queue.max_waiting}    # queue.max_waiting" in text
    assert "> 0.85 * 1024^3    # DELINEATE_APP_MEMORY" in text
    assert "DELINEATE_APP_MEMORY=1G\n" in (ROOT / ".env.example").read_text()
    assert f"queue.max_crashes ({config.queue.max_crashes})" in text
    assert f"worker.concurrency ({config.worker.concurrency})" in text
    assert f"worker.job_timeout ({config.worker.job_timeout:g})" in text
    assert config.worker.job_timeout < 300  # the `for` of QueueStuck
