"""The kinds of panel that the dashboards are made of, and what is the same in all of them.

Every panel has to say what it shows, what is normal and what to do when it is not: `About`. Every value is a link to
the log lines of its time, whose trace ids lead on to the traces (conf/grafana/provisioning/datasources).
"""

from __future__ import annotations

import json
import urllib.parse
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, Self, TypeVar

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TAG = "delineate"
NUMBERS = kinds.DataSourceRef(type_val="prometheus", uid="${datasource}")
# What log lines a panel's values lead to, when the panel names none of its own.
COMPLAINTS = '{service="app", level=~"warning|error|critical"}'


class Query(NamedTuple):
    """`legend` is a series' name, with its labels in {{ }}."""

    expr: str
    legend: str


class About(NamedTuple):
    """What a panel shows, what is normal there, and what to do otherwise."""

    shows: str
    normal: str
    otherwise: str

    def __str__(self) -> str:
        return f"{self.shows}\n\n**Normal:** {self.normal}\n\n**Otherwise:** {self.otherwise}"


class Limits(NamedTuple):
    """Colours by value: `lowest`, and each (value, colour) from its value on."""

    lowest: str = "green"
    steps: tuple[tuple[float, str], ...] = ()

    @classmethod
    def at_most(cls, yellow: float, red: float) -> Limits:
        return cls("green", ((yellow, "yellow"), (red, "red")))

    @classmethod
    def at_least(cls, yellow: float, green: float) -> Limits:
        return cls("red", ((yellow, "yellow"), (green, "green")))


NONE = Limits("blue")


class _Panel(Protocol):
    """What every builder of a panel can do."""

    def build(self) -> model.Panel: ...
    def id(self, id_val: int) -> Self: ...
    def title(self, title: str) -> Self: ...
    def description(self, description: str) -> Self: ...
    def datasource(self, datasource: kinds.DataSourceRef) -> Self: ...
    def targets(self, targets: list[Builder[Dataquery]]) -> Self: ...
    def height(self, h: int) -> Self: ...
    def span(self, w: int) -> Self: ...
    def data_links(self, links: list[Builder[model.DashboardLink]]) -> Self: ...
    def thresholds(self, thresholds: Builder[model.ThresholdsConfig]) -> Self: ...


P = TypeVar("P", bound=_Panel)


def dashboard(uid: str, title: str, description: str, *choices: Builder[model.VariableModel]) -> build.Dashboard:
    """An empty one, with the links, variables and alerts of all."""
    others = build.DashboardLink(TAG).type(model.DashboardLinkType.DASHBOARDS).tags([TAG])
    complaints = build.DashboardLink("Warnings and errors").type(model.DashboardLinkType.LINK).icon("doc")
    made = (
        build.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(others.icon("external link").include_vars(True).keep_time(True))
        .link(complaints.url(explore(COMPLAINTS)).target_blank(True))
        .with_variable(build.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .annotation(_Alerts())
    )
    for choice in choices:
        made.with_variable(choice)
    return made


def variable(name: str, label: str, metric: str) -> build.QueryVariable:
    """The instances that have sent `metric` in the time shown; any number of them, at first all."""
    everything = model.VariableOption(selected=True, text=["All"], value=["$__all"])
    return (
        build.QueryVariable(name)
        .label(label)
        .datasource(NUMBERS)
        .query({"qryType": 1, "query": f"label_values({metric}, instance)", "refId": name})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .current(everything)
    )


def row(title: str) -> build.Row:
    return build.Row(title).id(_id(f"row {title}"))


def number(
    title: str,
    about: About,
    query: Query,
    *,
    unit: str,
    limits: Limits,
    missing: str = "no data",
    logs: str = COMPLAINTS,
) -> stat.Panel:
    """The latest value, large and coloured, over its own past; `missing` stands where there is none."""
    panel = (
        stat.Panel()
        .unit(unit)
        .color_mode(kinds.BigValueColorMode.VALUE)
        .graph_mode(kinds.BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value(missing)
    )
    if unit == "short":
        panel.decimals(0)  # a count, which increase() makes a fraction of
    # What is counted over all the time shown is counted once, and has no past.
    once = "$__range" in query.expr
    return _whole(panel, title, about, [query], limits, logs, at_once=once).span(4).height(5)


def state(title: str, about: About, query: Query, words: Mapping[int, tuple[str, str]], width: int = 4) -> stat.Panel:
    """The latest values as words: value -> (word, colour)."""
    panel = (
        stat.Panel()
        .color_mode(kinds.BigValueColorMode.BACKGROUND)
        .graph_mode(kinds.BigValueGraphMode.NONE)
        .text_mode(kinds.BigValueTextMode.AUTO)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .mappings([_words(words)])
    )
    return _whole(panel, title, about, [query], NONE, COMPLAINTS).span(width).height(5)


def lines(
    title: str,
    about: About,
    *queries: Query,
    unit: str,
    limits: Limits = NONE,
    colors: Mapping[str, str] | None = None,
    stacked: kinds.StackingMode | None = None,
    width: int = 12,
    logs: str = COMPLAINTS,
) -> timeseries.Panel:
    """Values over time; `limits` are drawn as areas behind them, `colors` are for series of those names."""
    legend = common.VizLegendOptions().display_mode(kinds.LegendDisplayMode.TABLE).show_legend(True)
    tooltip = common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING)
    panel = (
        timeseries.Panel()
        .unit(unit)
        .min(0)
        .line_width(1)
        .fill_opacity(60 if stacked else 8)
        .show_points(kinds.VisibilityMode.AUTO)
        .legend(legend.placement(kinds.LegendPlacement.BOTTOM).calcs(["lastNotNull", "max"]))
        .tooltip(tooltip)
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(stacked).group("A"))
    if limits.steps:
        style = kinds.GraphThresholdsStyleMode.DASHED_AND_AREA
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(style))
    for name, color in (colors or {}).items():
        fixed = {"mode": "fixed", "fixedColor": color}
        panel.override_by_name(name, [model.DynamicConfigValue("color", fixed)])
    return _whole(panel, title, about, queries, limits, logs).span(width).height(8)


def bars(
    title: str, about: About, query: Query, *, unit: str, colors: Mapping[str, str], logs: str = COMPLAINTS
) -> bargauge.Panel:
    """One bar for each series, of the colour of its name."""
    panel = (
        bargauge.Panel()
        .unit(unit)
        .decimals(0)
        .min(0)
        .display_mode(kinds.BarGaugeDisplayMode.BASIC)
        .orientation(kinds.VizOrientation.HORIZONTAL)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    for name, color in colors.items():
        fixed = {"mode": "fixed", "fixedColor": color}
        panel.override_by_name(name, [model.DynamicConfigValue("color", fixed)])
    return _whole(panel, title, about, [query], NONE, logs, at_once=True).span(8).height(8)


def heat(title: str, about: About, expr: str, *, unit: str, width: int = 12, logs: str = COMPLAINTS) -> heatmap.Panel:
    """How many fell into each bucket of a histogram, over time; `expr` gives them by `le`."""
    scheme = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Turbo").steps(64)
    panel = (
        heatmap.Panel()
        .calculate(False)
        .color(scheme)
        .cell_gap(1)
        .y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(kinds.AxisPlacement.LEFT))
        .show_value(kinds.VisibilityMode.NEVER)
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .show_y_histogram()
    )
    made = _whole(panel, title, about, [Query(expr, "{{le}}")], NONE, logs, form=PromQueryFormat.HEATMAP)
    return made.span(width).height(8)


class Column(NamedTuple):
    title: str
    expr: str
    unit: str
    limits: Limits = NONE


def columns(
    title: str,
    about: About,
    labels: Sequence[str],
    *values: Column,
    width: int = 24,
    height: int = 9,
    logs: str = COMPLAINTS,
) -> table.Panel:
    """A row for each combination of `labels`, a column for each of `values`; sorted by the first value."""
    queries = [Query(value.expr, "") for value in values]
    # Grafana's names of the columns; with a single query there is nothing to tell apart.
    names = [f"Value #{ref}" for ref in _refs(queries)] if len(values) > 1 else ["Value"]
    order = {name: place for place, name in enumerate([*labels, *names])}
    panel = (
        table.Panel()
        .with_transformation(model.DataTransformerConfig("merge", options={}))
        .with_transformation(
            model.DataTransformerConfig("organize", options={"excludeByName": {"Time": True}, "indexByName": order})
        )
        .sort_by([common.TableSortByFieldState().display_name(values[0].title).desc(True)])
    )
    for name, value in zip(names, values, strict=True):
        decimals = [model.DynamicConfigValue("decimals", 0)] if value.unit == "short" else []
        cell = {"type": "color-text"} if value.limits.steps else {"type": "auto"}
        panel.override_by_name(
            name,
            [
                model.DynamicConfigValue("displayName", value.title),
                model.DynamicConfigValue("unit", value.unit),
                model.DynamicConfigValue("thresholds", _thresholds(value.limits).build()),
                model.DynamicConfigValue("custom.cellOptions", cell),
                *decimals,
            ],
        )
    made = _whole(panel, title, about, queries, NONE, logs, at_once=True, form=PromQueryFormat.TABLE)
    return made.span(width).height(height)


def states(
    title: str, about: About, query: Query, words: Mapping[int, tuple[str, str]], width: int = 12
) -> statetimeline.Panel:
    """What was when: a strip for each series, value -> (word, colour)."""
    panel = (
        statetimeline.Panel()
        .mappings([_words(words)])
        .show_value(kinds.VisibilityMode.NEVER)
        .row_height(0.8)
        .fill_opacity(80)
        .line_width(0)
    )
    return _whole(panel, title, about, [query], NONE, COMPLAINTS).span(width).height(8)


QUANTILE_COLORS = {"p50": "green", "p95": "yellow", "p99": "red"}


def quantiles(histogram: str, selector: str = "") -> list[Query]:
    """p50, p95 and p99 of `histogram`, of all series that `selector` chooses together."""
    chosen = ", ".join(filter(None, ('instance=~"$instance"', selector)))
    buckets = f"sum by (le) (rate({histogram}_bucket{{{chosen}}}[$__rate_interval]))"
    return [Query(f"histogram_quantile({share / 100}, {buckets})", f"p{share}") for share in (50, 95, 99)]


def explore(logs: str) -> str:
    """The address of Explore with these lines, of the time that a dashboard shows."""
    query = {"refId": "A", "expr": logs, "datasource": {"type": "loki", "uid": "loki"}, "queryType": "range"}
    pane = {"datasource": "loki", "queries": [query], "range": {"from": "${__from}", "to": "${__to}"}}
    # As it is written in a link, or Grafana would not see its own variables in it.
    panes = urllib.parse.quote(json.dumps({"logs": pane}, separators=(",", ":")), safe="")
    for name in ("__from", "__to"):
        panes = panes.replace(f"%24%7B{name}%7D", f"${{{name}}}")
    return f"/explore?schemaVersion=1&orgId=1&panes={panes}"


def _whole(
    panel: P,
    title: str,
    about: About,
    queries: Sequence[Query],
    limits: Limits,
    logs: str,
    *,
    at_once: bool = False,
    form: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> P:
    targets: list[Builder[Dataquery]] = []
    for ref, query in zip(_refs(queries), queries, strict=True):
        target = prometheus.Dataquery().ref_id(ref).expr(query.expr).legend_format(query.legend).format(form)
        targets.append(target.instant() if at_once else target.range())
    link = build.DashboardLink("Log lines of this time").url(explore(logs)).target_blank(True)
    return (
        panel.id(_id(title))
        .title(title)
        .description(str(about))
        .datasource(NUMBERS)
        .targets(targets)
        .thresholds(_thresholds(limits))
        .data_links([link])
    )


def _id(title: str) -> int:
    """From the title, so that panels may move without a link to one (viewPanel) leading to another."""
    return zlib.crc32(title.encode()) % 1_000_000


def _refs(queries: Sequence[Query]) -> str:
    return "ABCDEFGH"[: len(queries)]


def _thresholds(limits: Limits) -> build.ThresholdsConfig:
    steps = [model.Threshold(None, limits.lowest), *(model.Threshold(value, color) for value, color in limits.steps)]
    return build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


def _words(words: Mapping[int, tuple[str, str]]) -> model.ValueMap:
    results = {str(value): model.ValueMappingResult(text=word, color=color) for value, (word, color) in words.items()}
    return model.ValueMap(options=results)


class _Alerts(Builder[model.AnnotationQuery]):
    """Alerts that fire are marked in every panel. The builder knows nothing of what Prometheus adds to the model."""

    class Model(model.AnnotationQuery):
        def to_json(self) -> dict[str, object]:
            return super().to_json() | {"titleFormat": "{{alertname}}", "tagKeys": "severity", "step": "15s"}

    def build(self) -> model.AnnotationQuery:
        return self.Model(
            name="Alerts", datasource=NUMBERS, enable=True, icon_color="red", expr='ALERTS{alertstate="firing"}'
        )
