"""What the stack's watchers are told: valid, and as long, as often and as narrowly as the design says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tests.compose.stack import PRODUCTION, ROOT, Stack, make_checkout, services
from tests.promtool import promtool_check

CONF = ROOT / "conf"


def load(name: str) -> Any:
    return yaml.safe_load((CONF / name).read_text())


def test_promtool_accepts_the_configuration() -> None:
    promtool_check("config", str(CONF / "prometheus/prometheus.yml"))


def test_every_file_is_where_the_configuration_looks_for_it(stack: Stack) -> None:
    mounted = {one["target"] for one in services(stack.compose(PRODUCTION, ""))["prometheus"]["configs"]}
    files = ["prometheus.yml", *load("prometheus/prometheus.yml")["rule_files"]]
    assert mounted == {f"/etc/prometheus/{name}" for name in files}
    assert sorted(files) == sorted(file.name for file in (CONF / "prometheus").iterdir())


def test_the_alertmanager_of_the_runbook_is_found_by_prometheus(stack: Stack, tmp_path: Path) -> None:
    del stack  # skips where there is no Docker
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "runbook.md").read_text(), re.DOTALL)
    service, settings = (yaml.safe_load(block) for block in blocks)
    checkout = make_checkout(tmp_path / "delineate")
    (checkout / "compose.local.yml").write_text(blocks[0])
    (checkout / "alertmanager.yml").write_text(blocks[1])
    made = services(Stack(checkout).compose((*PRODUCTION, "compose.local.yml"), "seaweedfs"))["alertmanager"]
    assert "backend" in made["networks"]
    assert made["configs"][0]["target"] in made["command"][0]
    assert settings["global"]["smtp_auth_password_file"] == f"/run/secrets/{made['secrets'][0]['source']}"
    (found,) = load("prometheus/prometheus.yml")["alerting"]["alertmanagers"][0]["dns_sd_configs"]
    assert found["names"] == list(service["services"])


def test_the_alert_about_nginx_is_about_the_one_in_front(stack: Stack) -> None:
    found = re.search(r'nginx_up\{addr=~"([^"]+)"', (CONF / "prometheus" / "alerts.yml").read_text())
    assert found
    command = services(stack.compose(PRODUCTION, ""))["nginx-exporter"]["command"]
    asked = [word.removeprefix("--nginx.scrape-uri=") for word in command]
    assert [address for address in asked if re.fullmatch(found[1], address)] == ["http://nginx:8081/nginx_status"]


def test_every_machine_is_watched_without_privileges(stack: Stack) -> None:
    exporter = services(stack.swarm(("compose.yml",)))["node-exporter"]
    assert exporter["deploy"]["mode"] == "global"
    assert exporter["deploy"]["endpoint_mode"] == "dnsrr"  # or its name would lead to one of them
    assert exporter["user"] == "65534:65534"
    assert [volume["read_only"] for volume in exporter["volumes"]] == [True]


def test_every_target_is_a_service_of_the_stack(stack: Stack) -> None:
    known = {name for store in ("seaweedfs", "minio") for name in services(stack.compose(PRODUCTION, store))}
    jobs = load("prometheus/prometheus.yml")["scrape_configs"]
    named = {name for job in jobs for found in job.get("dns_sd_configs", ()) for name in found["names"]}
    groups = [group for job in jobs for group in job.get("static_configs", ())]
    fixed = {target.partition(":")[0] for group in groups for target in group["targets"]}
    assert (named | fixed) - {"localhost"} <= known
    assert {"app", "s3", "minio"} <= named  # by DNS: any number of containers, also none


def test_metrics_are_kept_for_15_days_and_asked_every_15_seconds(stack: Stack) -> None:
    assert load("prometheus/prometheus.yml")["global"]["scrape_interval"] == "15s"
    assert "--storage.tsdb.retention.time=15d" in services(stack.compose(PRODUCTION, ""))["prometheus"]["command"]


def test_lines_are_kept_for_7_days() -> None:
    loki = load("loki.yml")
    assert loki["limits_config"]["retention_period"] == "168h"
    assert loki["compactor"]["retention_enabled"] is True
    assert loki["compactor"]["delete_request_store"]


def test_lines_have_few_labels() -> None:
    alloy = (CONF / "config.alloy").read_text()
    assert set(re.findall(r'target_label\s*=\s*"(\w+)"', alloy)) == {"service"}
    assert re.findall(r"stage\.labels \{\s*values = \{(.*?)\}", alloy) == [' level = "" ']
    assert alloy.count("{") == alloy.count("}")


def test_grafana_finds_numbers_lines_and_traces() -> None:
    sources = {each["uid"]: each for each in load("grafana/provisioning/datasources/delineate.yml")["datasources"]}
    assert {uid: source["url"] for uid, source in sources.items()} == {
        "prometheus": "http://prometheus:9090",
        "loki": "http://loki:3100",
        "jaeger": "http://jaeger:16686",
    }
    (field,) = sources["loki"]["jsonData"]["derivedFields"]
    assert field["datasourceUid"] == "jaeger"
    line = '{"level": "info", "traceId": "4bf92f3577b34da6a3ce929d0e0e4736", "spanId": ""}'
    found = re.search(field["matcherRegex"], line)
    assert found
    assert found[1] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert not re.search(field["matcherRegex"], '{"traceId": "", "spanId": ""}')


def test_grafana_asks_for_a_password(stack: Stack) -> None:
    environment = services(stack.compose(PRODUCTION, ""))["grafana"]["environment"]
    assert environment["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/run/secrets/grafana_password"
    assert (environment["GF_AUTH_ANONYMOUS_ENABLED"], environment["GF_USERS_ALLOW_SIGN_UP"]) == ("false", "false")


def test_dashboards_reach_every_machine(stack: Stack) -> None:
    """As configs, which swarm brings along; a folder of the checkout would stay where it is."""
    (provider,) = load("grafana/provisioning/dashboards/delineate.yml")["providers"]
    rendered = stack.swarm(("compose.yml",))
    sources = {config["target"]: config["source"] for config in rendered["services"]["grafana"]["configs"]}
    folder = provider["options"]["path"]
    for file in (ROOT / "dashboards").glob("*.json"):
        config = rendered["configs"][sources[f"{folder}/{file.name}"]]
        assert config["file"].endswith(f"/dashboards/{file.name}")
        assert config["name"].endswith("_1")  # DELINEATE_CONFIG_VERSION
        assert file.stat().st_size < 500_000  # swarm takes no more


def test_grafana_leads_from_a_span_to_its_lines_and_numbers() -> None:
    sources = {
        each["uid"]: each["jsonData"] for each in load("grafana/provisioning/datasources/delineate.yml")["datasources"]
    }
    lines, numbers = sources["jaeger"]["tracesToLogsV2"], sources["jaeger"]["tracesToMetrics"]
    assert (lines["datasourceUid"], numbers["datasourceUid"]) == ("loki", "prometheus")
    # Grafana expands variables of the environment in this file; two dollars are one of its own.
    assert lines["query"].count("$${__trace.traceId}") == 1
    assert all("$$__tags" in each["query"] for each in numbers["queries"])
    assert "$" not in json.dumps(sources).replace("$$", "")
