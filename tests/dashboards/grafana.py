"""What Grafana makes of a dashboard: its panels, their variables, and what Prometheus answers."""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

from dashboards.written import FOLDER
from tests.dashboards.recording import Recording

Series = tuple[dict[str, str], list[tuple[float, float]]]


def boards() -> dict[str, dict[str, Any]]:
    """File name -> dashboard, as Grafana reads them."""
    return {file.name: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


class Asked(NamedTuple):
    """One expression of one panel."""

    panel: str
    expr: str
    at_once: bool


def asked(board: dict[str, Any]) -> Iterator[Asked]:
    for panel in panels(board):
        for target in panel["targets"]:
            yield Asked(panel["title"], target["expr"], bool(target["instant"]))


class Prometheus:
    """Prometheus of a recording. `step` is the time between two values of a graph."""

    def __init__(self, recorded: Recording, step: int = 1, rate_interval: str = "5s") -> None:
        self._recorded, self.step, self._rate_interval = recorded, step, rate_interval
        self.start, self.seconds = recorded.start, recorded.end - recorded.start

    def get(self, path: str, **query: str) -> Any:
        address = f"{self._recorded.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:  # noqa: S310
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error

    def substituted(self, board: dict[str, Any], expr: str) -> str:
        """The expression as Grafana sends it, with every variable at All."""
        values = {
            "__rate_interval": self._rate_interval,
            "__range": f"{math.ceil(self._recorded.end - self._recorded.start)}s",
        }
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                values[variable["name"]] = self._all(variable["query"]["query"])
        for name, value in values.items():
            expr = re.sub(rf"\${name}\b", value.replace("\\", r"\\"), expr)
        assert "$" not in expr, f"not a variable of the dashboard: {expr}"
        return expr

    def _all(self, query: str) -> str:
        """All values of a label_values(metric, label), for =~."""
        found = re.fullmatch(r"label_values\((\w+), (\w+)\)", query)
        assert found, query
        metric, label = found.groups()
        times = {"start": str(self._recorded.start), "end": str(self._recorded.end)}
        values = self.get(f"label/{label}/values", **{"match[]": metric}, **times)
        assert values, f"{query} has no values"
        # Within quotes of PromQL a backslash is two.
        return "(" + "|".join(re.escape(value).replace("\\", "\\\\") for value in values) + ")"

    def series(self, expr: str, *, at_once: bool = False) -> list[Series]:
        """What an expression gives, without what is no number."""
        recorded = self._recorded
        if at_once:
            answer = self.get("query", query=expr, time=str(recorded.end))
            found = [(each["metric"], [each["value"]]) for each in answer["result"]]
        else:
            times = {"start": str(recorded.start), "end": str(recorded.end), "step": str(self.step)}
            answer = self.get("query_range", query=expr, **times)
            found = [(each["metric"], each["values"]) for each in answer["result"]]
        numbers = [
            (labels, [(float(at), float(value)) for at, value in values if math.isfinite(float(value))])
            for labels, values in found
        ]
        return [(labels, values) for labels, values in numbers if values]
