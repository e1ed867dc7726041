"""Draw the dashboards for docs/images: `make pictures`.

Not Grafana: matplotlib, from the same JSON and the same expressions, at a real Prometheus that has watched a service
for seven minutes. It knows of Grafana's panels what dashboards/panels.py uses.
"""

from __future__ import annotations

import math
import operator
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from tests.compose.stack import ROOT
from tests.dashboards.grafana import Prometheus, Series, boards, panels
from tests.dashboards.recording import recording
from tests.dashboards.traffic import Pace

PACE = Pace(seconds=400, jobs_per_second=0.8, job_seconds=(1, 18), slow_seconds=65, scrape_seconds=2)
WIDTH, UNIT, GAP, DPI = 1500, 36, 8, 100  # pixels; a unit is one row of Grafana's grid of 24 columns
PAGE, PANEL, EDGE, TEXT, FAINT = "#111217", "#181b1f", "#2c3235", "#d0d1d9", "#8e8f99"
COLORS = {
    "green": "#73bf69", "dark-green": "#37872d", "semi-dark-green": "#56a64b", "light-green": "#96d98d",
    "yellow": "#fade2a", "red": "#f2495c", "dark-red": "#c4162a", "orange": "#ff9830",
    "blue": "#5794f2", "light-blue": "#8ab8ff", "purple": "#b877d9",
}  # fmt: skip
PALETTE = ["#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#8ab8ff", "#b877d9", "#705da0", "#37872d", "#fade2a"]


def main() -> None:
    folder = ROOT / "docs" / "images"
    folder.mkdir(exist_ok=True)
    mpl.rcParams.update({"font.size": 8, "text.color": TEXT, "font.family": "DejaVu Sans"})
    with tempfile.TemporaryDirectory() as scratch, recording(Path(scratch), PACE) as recorded:
        busy = recorded._replace(end=recorded.busy_until)
        prometheus = Prometheus(busy, step=2 * PACE.scrape_seconds, rate_interval="20s")
        for name, board in boards().items():
            file = folder / f"dashboard-{Path(name).stem}.png"
            _Picture(board, prometheus).save(file)
            print(f"{file.relative_to(ROOT)}: {file.stat().st_size // 1000} kB", file=sys.stderr)


class _Picture:
    """One dashboard."""

    def __init__(self, board: dict[str, Any], prometheus: Prometheus) -> None:
        self._board, self._prometheus = board, prometheus
        places = [panel["gridPos"] for panel in board["panels"]]
        self._height = max(place["y"] + place["h"] for place in places) * UNIT + GAP + UNIT
        self._figure = Figure(figsize=(WIDTH / DPI, self._height / DPI), dpi=DPI, facecolor=PAGE)
        self._figure.text(GAP / WIDTH, 1 - UNIT / 2 / self._height, board["title"], size=14, weight="bold", va="center")

    def save(self, file: Path) -> None:
        draw: dict[str, Callable[[dict[str, Any], Axes], None]] = {
            "stat": self._stat,
            "timeseries": self._lines,
            "bargauge": self._bars,
            "heatmap": self._heat,
            "table": self._table,
            "state-timeline": self._states,
        }
        for row in self._board["panels"]:
            if row["type"] == "row":
                x, y, _, h = self._pixels(row["gridPos"])
                self._text(x, y + h / 2, f"⌄ {row['title']}", size=10, weight="bold", va="center")
        for panel in panels(self._board):
            x, y, w, h = self._pixels(panel["gridPos"])
            left, bottom, width, height = self._box(x, y, w, h)
            frame = Rectangle((left, bottom), width, height, facecolor=PANEL, edgecolor=EDGE, zorder=-1)
            self._figure.add_artist(frame)
            self._text(x + 10, y + 15, panel["title"], size=9, weight="bold", va="center")
            axes = self._figure.add_axes(self._box(x, y + 26, w, h - 26))
            draw[panel["type"]](panel, axes)
        self._figure.savefig(file, facecolor=PAGE)
        # Few colours, so that a picture is a quarter as large.
        Image.open(file).convert("RGB").quantize(200).save(file, optimize=True)

    def _pixels(self, place: dict[str, int]) -> tuple[float, float, float, float]:
        column = (WIDTH - GAP) / 24
        x, y = GAP + place["x"] * column, UNIT + place["y"] * UNIT
        return x, y, place["w"] * column - GAP, place["h"] * UNIT - GAP

    def _box(self, x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        return x / WIDTH, 1 - (y + h) / self._height, w / WIDTH, h / self._height

    def _text(self, x: float, y: float, text: str, **how: Any) -> None:
        self._figure.text(x / WIDTH, 1 - y / self._height, text, **how)

    def _found(self, panel: dict[str, Any]) -> list[tuple[str, Series]]:
        """Every series of a panel with its name in the legend."""
        found = []
        for target in panel["targets"]:
            expr = self._prometheus.substituted(self._board, target["expr"])
            for labels, values in self._prometheus.series(expr, at_once=target["instant"]):
                found.append((_named(target["legendFormat"], labels), (labels, values)))
        return sorted(found, key=operator.itemgetter(0))

    def _stat(self, panel: dict[str, Any], axes: Axes) -> None:
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        defaults = panel["fieldConfig"]["defaults"]
        found = self._found(panel)
        if not found:
            axes.text(0.5, 0.5, defaults.get("noValue", "no data"), ha="center", va="center", size=12, color=FAINT)
            return
        _, (_, values) = found[0]
        last = values[-1][1]
        if words := _words(panel):
            word, color = words[int(last)]
            axes.add_patch(Rectangle((0.04, 0.08), 0.92, 0.84, facecolor=color))
            axes.text(0.5, 0.5, word, ha="center", va="center", size=18, weight="bold", color="#111217")
            return
        color = _color_of(last, defaults["thresholds"]["steps"])
        axes.text(
            0.5, 0.68, _with_unit(last, defaults["unit"]), ha="center", va="center", size=21, weight="bold", color=color
        )
        if len(values) > 1:
            past = axes.inset_axes((0, 0, 1, 0.38))
            past.axis("off")
            times, numbers = [at for at, _ in values], [value for _, value in values]
            past.fill_between(times, numbers, color=color, alpha=0.25, linewidth=0)
            past.plot(times, numbers, color=color, linewidth=1)
            past.set(ylim=(0, max(*numbers, 1e-9) * 1.1), xlim=(times[0], times[-1]))

    def _lines(self, panel: dict[str, Any], outer: Axes) -> None:
        outer.axis("off")
        found = self._found(panel)
        shown = found[:5]
        rows = max(len(shown), 1) + (len(found) > len(shown))
        pixels = panel["gridPos"]["h"] * UNIT - GAP - 26
        below = (rows + 1) * 15 + 28
        left = 74 / (panel["gridPos"]["w"] * (WIDTH - GAP) / 24 - GAP)
        axes = outer.inset_axes((left, below / pixels, 0.97 - left, 0.98 - below / pixels))
        unit = panel["fieldConfig"]["defaults"]["unit"]
        self._time_axis(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _with_unit(value, unit)))
        axes.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2, integer=unit == "short"))
        custom, colors = panel["fieldConfig"]["defaults"].get("custom", {}), _fixed_colors(panel)
        chosen = [colors.get(name, PALETTE[place % len(PALETTE)]) for place, (name, _) in enumerate(found)]
        stacked = custom.get("stacking", {}).get("mode") == "normal"
        if stacked:
            self._stack(axes, found, chosen)
        else:
            for (_, (_, values)), color in zip(found, chosen, strict=True):
                times, numbers = self._with_gaps(values)
                axes.plot(times, numbers, color=color, linewidth=1.2)
                axes.fill_between(times, numbers, color=color, alpha=0.08, linewidth=0)
        _, top = axes.get_ylim()
        axes.set_ylim(0, top if found else 1)
        self._limits(panel, axes)
        y = below - 34
        for place, name in ((0.70, "Last"), (0.86, "Max")):
            outer.text(place, y / pixels, name, size=7, color=FAINT, va="center", transform=outer.transAxes)
        for (name, (_, values)), color in zip(shown, chosen, strict=False):
            y -= 15
            outer.add_patch(
                Rectangle((0.02, (y - 1) / pixels), 0.018, 3 / pixels, facecolor=color, transform=outer.transAxes)
            )
            room = int(0.63 * panel["gridPos"]["w"] * 10.5)
            short = name if len(name) <= room else name[: room - 1] + "…"
            numbers = [value for _, value in values]
            outer.text(0.05, y / pixels, short, size=7, va="center", transform=outer.transAxes)
            outer.text(0.70, y / pixels, _with_unit(numbers[-1], unit), size=7, va="center", transform=outer.transAxes)
            outer.text(0.86, y / pixels, _with_unit(max(numbers), unit), size=7, va="center", transform=outer.transAxes)
        if len(found) > len(shown):
            more = f"and {len(found) - len(shown)} more"
            outer.text(0.05, (y - 15) / pixels, more, size=7, color=FAINT, va="center", transform=outer.transAxes)

    def _stack(self, axes: Axes, found: list[tuple[str, Series]], colors: list[str]) -> None:
        times = sorted({at for _, (_, values) in found for at, _ in values})
        rows = [[dict(values).get(at, 0.0) for at in times] for _, (_, values) in found]
        axes.stackplot(self._moments([(at, 0) for at in times]), rows, colors=colors, alpha=0.65, linewidth=0)

    def _limits(self, panel: dict[str, Any], axes: Axes) -> None:
        """Thresholds as Grafana's "dashed lines and areas"."""
        defaults = panel["fieldConfig"]["defaults"]
        if "thresholdsStyle" not in defaults.get("custom", {}):
            return
        steps = defaults["thresholds"]["steps"]
        bottom, top = axes.get_ylim()
        ends = [step["value"] for step in steps[1:]] + [math.inf]
        for step, end in zip(steps, ends, strict=True):
            begin = step["value"] if step["value"] is not None else bottom
            if begin < top:
                axes.axhspan(begin, min(end, top), color=COLORS[step["color"]], alpha=0.07, linewidth=0)
            if step["value"] is not None and begin < top:
                axes.axhline(begin, color=COLORS[step["color"]], linewidth=0.8, linestyle="--")

    def _bars(self, panel: dict[str, Any], axes: Axes) -> None:
        axes.axis("off")
        found, colors = self._found(panel), _fixed_colors(panel)
        values = {name: numbers[-1][1] for name, (_, numbers) in found}
        most, height = max(*values.values(), 1e-9), 1 / max(len(values), 1)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        # In the order of the colours, which is that of the tiers.
        for place, name in enumerate(name for name in colors if name in values):
            y = 1 - (place + 0.75) * height
            axes.add_patch(Rectangle((0.17, y), 0.63, height * 0.5, facecolor="#22252b"))
            axes.add_patch(Rectangle((0.17, y), 0.63 * values[name] / most, height * 0.5, facecolor=colors[name]))
            axes.text(0.03, y + height / 4, name, va="center", size=9)
            said = _with_unit(values[name], panel["fieldConfig"]["defaults"]["unit"])
            axes.text(0.83, y + height / 4, said, va="center", size=13, weight="bold", color=colors[name])

    def _heat(self, panel: dict[str, Any], outer: Axes) -> None:
        outer.axis("off")
        axes = outer.inset_axes((0.09, 0.1, 0.88, 0.86))
        buckets = sorted((float(labels["le"]), dict(values)) for _, (labels, values) in self._found(panel))
        times = sorted({at for _, values in buckets for at, _ in values.items()})
        rows, below = [], dict.fromkeys(times, 0.0)
        for _, values in buckets:
            rows.append([max(values.get(at, 0) - below[at], 0) for at in times])
            below = {at: values.get(at, 0) for at in times}
        cells = [[value if value > 1e-9 else math.nan for value in row] for row in rows]
        most = max((value for row in rows for value in row), default=1)
        norm = LogNorm(vmin=max(most / 100, 1e-3), vmax=max(most, 1e-2), clip=True)
        axes.pcolormesh(self._moments([(at, 0) for at in times]), range(len(rows)), cells, cmap="turbo", norm=norm)
        self._time_axis(axes)
        unit = panel["options"]["yAxis"]["unit"]
        names = [_with_unit(le, unit) if math.isfinite(le) else "+Inf" for le, _ in buckets]
        axes.set_yticks(range(0, len(names), 2), names[::2])

    def _table(self, panel: dict[str, Any], axes: Axes) -> None:
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        rows: dict[tuple[tuple[str, str], ...], dict[int, float]] = {}
        for place, target in enumerate(panel["targets"]):
            expr = self._prometheus.substituted(self._board, target["expr"])
            for labels, values in self._prometheus.series(expr, at_once=True):
                rows.setdefault(tuple(sorted(labels.items())), {})[place] = values[-1][1]
        columns = [
            {each["id"]: each["value"] for each in override["properties"]}
            for override in panel["fieldConfig"]["overrides"]
        ]
        order: dict[str, int] = panel["transformations"][1]["options"]["indexByName"]
        names = [name for name in sorted(order, key=lambda name: order[name]) if not name.startswith("Value")]
        heads = names + [column["displayName"] for column in columns]
        # The last label is the longest: two shares for it, one for each of the others.
        shares = [1.0] * len(heads)
        shares[len(names) - 1] = 2
        starts = [0.01 + sum(shares[:place]) / sum(shares) for place in range(len(heads))]
        lines = int((panel["gridPos"]["h"] * UNIT - 34) / 20) - 1
        height = 1 / (lines + 1)
        for start, head in zip(starts, heads, strict=True):
            axes.text(start, 1 - height / 2, head, size=8, weight="bold", color="#6e9fff", va="center")
        ordered = sorted(rows.items(), key=lambda row: -row[1].get(0, 0))
        for line, (row, cells) in enumerate(ordered[:lines], start=1):
            y = 1 - (line + 0.5) * height
            axes.plot([0.005, 0.995], [y + height / 2] * 2, color=EDGE, linewidth=0.6)
            for start, name in zip(starts, names, strict=False):
                axes.text(start, y, dict(row).get(name, ""), size=8, va="center")
            for place, column in enumerate(columns):
                if place not in cells:
                    continue
                steps = column["thresholds"]["steps"]
                color = _color_of(cells[place], steps) if len(steps) > 1 else TEXT
                said = _with_unit(cells[place], column["unit"])
                axes.text(starts[len(names) + place], y, said, size=8, va="center", color=color)

    def _states(self, panel: dict[str, Any], outer: Axes) -> None:
        outer.axis("off")
        axes = outer.inset_axes((0.34, 0.1, 0.63, 0.86))
        found, words = self._found(panel), _words(panel)
        for row, (_, (_, values)) in enumerate(found):
            moments = self._moments(values)
            for begin, end, (_, value) in zip(moments, moments[1:], values, strict=False):
                axes.barh(row, end - begin, left=begin, height=0.7, color=words[int(value)][1], linewidth=0)
        self._time_axis(axes)
        axes.grid(visible=False)
        axes.set_yticks(range(len(found)), [name.replace("127.0.0.1", "") for name, _ in found])
        axes.set_ylim(len(found) - 0.5, -0.5)

    def _with_gaps(self, values: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
        """Times and values, and nothing between those that are no neighbours."""
        step = self._prometheus.step
        whole: list[tuple[float, float]] = []
        for at, value in values:
            if whole and at > whole[-1][0] + 1.5 * step:
                whole.append((at - step, math.nan))
            whole.append((at, value))
        return self._moments(whole), [value for _, value in whole]

    def _moments(self, values: list[tuple[float, float]]) -> list[float]:
        """Seconds since the recording began."""
        return [at - self._prometheus.start for at, _ in values]

    def _time_axis(self, axes: Axes) -> None:
        axes.set_facecolor(PANEL)
        axes.grid(color=EDGE, linewidth=0.6)
        axes.tick_params(colors=FAINT, labelsize=7, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlim(0, self._prometheus.seconds)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda second, _: f"{int(second) // 60}:{int(second) % 60:02d}"))
        axes.set_axisbelow(True)


def _named(legend: str, labels: dict[str, str]) -> str:
    for name in re.findall(r"{{(\w+)}}", legend):
        legend = legend.replace(f"{{{{{name}}}}}", labels.get(name, ""))
    return legend.strip() or "value"


def _color_of(value: float, steps: list[dict[str, Any]]) -> str:
    """Of the last step that is reached; the first has no value, and is for all below the second."""
    return COLORS[[step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]]


def _words(panel: dict[str, Any]) -> dict[int, tuple[str, str]]:
    return {
        int(value): (word["text"], COLORS[word["color"]])
        for mapping in panel["fieldConfig"]["defaults"].get("mappings", [])
        for value, word in mapping["options"].items()
    }


def _fixed_colors(panel: dict[str, Any]) -> dict[str, str]:
    return {
        override["matcher"]["options"]: COLORS[each["value"]["fixedColor"]]
        for override in panel["fieldConfig"]["overrides"]
        for each in override["properties"]
        if each["id"] == "color"
    }


_EMPTY = {"short": "", "reqpm": " req/min", "reqps": " req/s", "opm": " /min", "ops": " ops/s", "cps": " /s"}


def _with_unit(value: float, unit: str) -> str:
    """As Grafana writes it, nearly."""
    if unit == "percentunit":
        return f"{_short(value * 100)}%"
    if unit == "s":
        if value < 1e-3:
            return f"{_short(value * 1e6)} µs" if value else "0 s"
        if value < 1:
            return f"{_short(value * 1e3)} ms"
        return f"{_short(value)} s" if value < 60 else f"{_short(value / 60)} min"
    if unit in ("bytes", "Bps"):
        step, names = (1024, ("B", "KiB", "MiB", "GiB")) if unit == "bytes" else (1000, ("B", "kB", "MB", "GB"))
        power = min(int(math.log(value, step)), 3) if value >= 1 else 0
        return f"{_short(value / step**power)} {names[power]}{'/s' if unit == 'Bps' else ''}"
    return (f"{value:.0f}" if unit == "short" and value < 1000 else _short(value)) + _EMPTY[unit]


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:.3g} K"
    return f"{value:.3g}"


if __name__ == "__main__":
    main()
