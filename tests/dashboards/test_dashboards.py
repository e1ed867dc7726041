"""Every panel shows something: all expressions of dashboards and rules, at a Prometheus with real numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from dashboards.written import FOLDER, written
from tests.compose.stack import ROOT
from tests.dashboards.grafana import Asked, Prometheus, asked, boards, panels
from tests.dashboards.recording import Recording, recording, rule_files
from tests.dashboards.traffic import Pace
from tests.test_metrics import DOCUMENT

PACE = Pace(seconds=20, jobs_per_second=2, job_seconds=(1, 2), slow_seconds=1, scrape_seconds=1)
BOARDS = boards()
PANELS = [(name, one) for name, board in BOARDS.items() for one in asked(board)]
# Where nothing but 0 is right in the traffic that is recorded.
ZERO = {
    "export_queue_paused": "nobody pauses it",
    "process_disk_read_bytes_total": "nothing is swapped out",
    "process_disk_written_bytes_total": "files go from the store to the store",
    "redis_memory_max_bytes": "this Redis has no limit",
    "nginx_connections_reading": "nobody sends slowly",
    "node_network_": "all of it is on the loopback",
    "up == 0": "every target answers",
}
OURS = set(re.findall(r"^\| `(\w+)` \| (?:counter|gauge|histogram) \|", DOCUMENT, re.MULTILINE))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    with recording(tmp_path_factory.mktemp("recorded"), PACE) as done:
        yield done


@pytest.fixture(scope="module")
def prometheus(recorded: Recording) -> Prometheus:
    return Prometheus(recorded)


def test_the_files_are_what_the_code_says() -> None:
    found = {file.name: file.read_text() for file in FOLDER.glob("*.json")}
    assert found == written(), "run `make dashboards`"


@pytest.mark.parametrize(("name", "one"), PANELS, ids=[f"{name} {one.panel}" for name, one in PANELS])
def test_every_expression_finds_something(prometheus: Prometheus, name: str, one: Asked) -> None:
    found = prometheus.series(prometheus.substituted(BOARDS[name], one.expr), at_once=one.at_once)
    assert found
    assert any(name in one.expr for name in ZERO) or any(value for _, values in found for _, value in values)


@pytest.mark.parametrize("name", BOARDS)
def test_alerts_are_marked(prometheus: Prometheus, name: str) -> None:
    (alerts,) = BOARDS[name]["annotations"]["list"]
    prometheus.series(alerts["expr"])  # none has to fire, but the expression has to be one


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_is_whole(name: str) -> None:
    board = BOARDS[name]
    assert board["uid"].startswith("delineate-")
    assert board["schemaVersion"] >= 41
    assert not {"id", "__inputs"} & board.keys()  # both are of another Grafana
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in board["panels"])
    for panel in panels(board):
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        _, normal, otherwise = panel["description"].split("\n\n")
        assert normal.startswith("**Normal:** ")
        assert otherwise.startswith("**Otherwise:** ")


@pytest.mark.parametrize("name", BOARDS)
def test_every_value_leads_to_its_log_lines(name: str) -> None:
    file = ROOT / "conf" / "grafana" / "provisioning" / "datasources" / "delineate.yml"
    known = {source["uid"]: source["type"] for source in yaml.safe_load(file.read_text())["datasources"]}
    for panel in panels(BOARDS[name]):
        (link,) = panel["fieldConfig"]["defaults"]["links"]
        (pane,) = json.loads(parse_qs(urlsplit(link["url"]).query)["panes"][0]).values()
        assert pane["range"] == {"from": "${__from}", "to": "${__to}"}
        (query,) = pane["queries"]
        assert known[query["datasource"]["uid"]] == query["datasource"]["type"] == "loki"
        # The labels that Alloy gives, and only those.
        assert re.match(r'{service=~?"[a-z0-9|]+"(, level=~"[a-z|]+")?}', query["expr"])


def test_every_metric_of_ours_is_on_a_dashboard() -> None:
    shown = " ".join(one.expr for _, one in PANELS)
    assert {name for name in OURS if not re.search(rf"\b{name}(_bucket|_count)?\b", shown)} == set()


def test_every_metric_that_is_shown_exists() -> None:
    """Also where there is no Prometheus to ask."""
    shown = {name for _, one in PANELS for name in re.findall(r"\b[a-z]\w+(?=[{[])", one.expr)}
    ours = {name for name in shown if not name.startswith(("node_", "nginx_", "redis_commands_"))}
    assert {re.sub("_(bucket|count)$", "", name) for name in ours} <= OURS


def test_every_rule_works(prometheus: Prometheus) -> None:
    for file in rule_files():
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in group["rules"]:
                found = prometheus.series(rule["expr"], at_once=True)
                assert found or "alert" in rule, f"{rule['record']} finds nothing"
