"""The dashboard as a picture: what its panels show of a running deployment, for where there is no Grafana to look at.

python benchmarks/dashboard_plot.py --prometheus localhost:9090 --minutes 10 --out docs/dashboard.png
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DASHBOARD: Final = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards" / "groundglass.json"
COLUMNS: Final = 3
SIZE_INCH: Final = (12.0, 9.0)
DPI: Final = 100
POINTS: Final = 150
LEGEND_ROOM: Final = 1.4
"""Height of a panel over that of its lines."""

UNITS: Final = {"percentunit": (100.0, "%"), "s": (1.0, "s"), "none": (1.0, "")}
"""Grafana's unit: what a value is multiplied with, and the word for it."""

COLOURS: Final = ("#1f5f8b", "#d9822b", "#3a7d44", "#8c3a5b", "#6b6b6b", "#b8a13a", "#4aa3a2")
STATES: Final = {"pending": "#e8c48b", "firing": "#c0392b"}
_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Span:
    """The time that is shown, in seconds since 1970."""

    start_s: float
    end_s: float

    @property
    def step_s(self) -> float:
        """Between two points."""
        return max(1.0, (self.end_s - self.start_s) / POINTS)


@dataclass(frozen=True, slots=True)
class Line:
    """One series: minutes since the start of the span, values, NaN where there is none, and its labels."""

    minutes: Sequence[float]
    values: Sequence[float]
    labels: dict[str, str]


def main() -> int:
    """Ask, draw, write. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="localhost:9090", help="HOST:PORT of Prometheus")
    parser.add_argument("--minutes", type=float, default=10.0, help="how far back")
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"))
    given = parser.parse_args()
    now_s = time.time()
    try:
        draw(given.prometheus, Span(now_s - 60 * given.minutes, now_s), given.out)
    except (URLError, OSError) as error:
        print(f"dashboard_plot: {given.prometheus}: {getattr(error, 'reason', error)}", file=sys.stderr)
        return 1
    print(given.out)
    return 0


def draw(prometheus: str, span: Span, out: Path) -> None:
    """All time series of the dashboard in its order, and below them when which alert was pending or firing."""
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] == "timeseries"]
    rows = math.ceil(len(panels) / COLUMNS)
    canvas = Figure(figsize=SIZE_INCH, layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.add_gridspec(rows + 1, COLUMNS, height_ratios=[*[1.0] * rows, 0.75])
    for place, panel in enumerate(panels):
        axes = canvas.add_subplot(grid[place // COLUMNS, place % COLUMNS])
        draw_panel(axes, panel, prometheus, span)
    draw_alerts(canvas.add_subplot(grid[rows, :]), prometheus, span)
    canvas.savefig(out, dpi=DPI)


def draw_panel(axes: Any, panel: dict[str, Any], prometheus: str, span: Span) -> None:
    """The lines of one panel."""
    defaults = panel["fieldConfig"]["defaults"]
    factor, unit = UNITS[defaults["unit"]]
    found = [(target, line) for target in panel["targets"] for line in ask(prometheus, target["expr"], span)]
    for number, (target, line) in enumerate(found):
        values = [factor * value for value in line.values]
        axes.plot(
            line.minutes,
            values,
            label=named(target["legendFormat"], line),
            color=COLOURS[number % len(COLOURS)],
            linewidth=1.1,
        )
    frame(axes, span)
    axes.set_title(panel["title"] + (f", {unit}" if unit else ""), fontsize=8, loc="left")
    axes.set_ylim(0, LEGEND_ROOM * axes.get_ylim()[1])
    if found:
        axes.legend(frameon=False, fontsize=5.5, ncols=2 if len(found) > 2 else 1, loc="upper left")
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="#888888", fontsize=8)


def named(pattern: str, line: Line) -> str:
    """What Grafana would call the line: ``{{label}}`` stands for the label's value."""
    return re.sub(r"{{(\w+)}}", lambda label: line.labels.get(label[1], ""), pattern)


def draw_alerts(axes: Any, prometheus: str, span: Span) -> None:
    """A row for each alert that was pending or firing."""
    lines = ask(prometheus, "max by (alertname, alertstate) (ALERTS)", span)
    names = sorted({line.labels["alertname"] for line in lines}, reverse=True)
    for line in sorted(lines, key=lambda line: line.labels["alertstate"], reverse=True):
        active = [minute for minute, value in zip(line.minutes, line.values, strict=True) if not math.isnan(value)]
        bars = [(minute, span.step_s / 60) for minute in active]
        row = names.index(line.labels["alertname"])
        axes.broken_barh(bars, (row - 0.35, 0.7), color=STATES[line.labels["alertstate"]], linewidth=0)
    frame(axes, span)
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    axes.set_ylim(-0.6, max(1, len(names)) - 0.4)
    axes.set_title("Alerts: pending (light), firing (red)", fontsize=8, loc="left")
    axes.set_xlabel("minutes", fontsize=7)


def frame(axes: Any, span: Span) -> None:
    """What all panels have in common."""
    axes.set_xlim(0, (span.end_s - span.start_s) / 60)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.3)
    axes.tick_params(labelsize=6)


def ask(prometheus: str, expression: str, span: Span) -> list[Line]:
    """The series of an expression over the span."""
    times = {"start": span.start_s, "end": span.end_s, "step": span.step_s}
    address = f"http://{prometheus}/api/v1/query_range?{urlencode({'query': expression, **times})}"
    with urlopen(address, timeout=_TIMEOUT_S) as answer:
        result = json.load(answer)["data"]["result"]
    return [_line(series, span) for series in result]


def _line(series: dict[str, Any], span: Span) -> Line:
    """With a gap, not a straight line, where Prometheus had nothing."""
    known = {round((at_s - span.start_s) / span.step_s): float(value) for at_s, value in series["values"]}
    steps = range(min(known), max(known) + 1)
    minutes = [step * span.step_s / 60 for step in steps]
    return Line(minutes, [known.get(step, math.nan) for step in steps], series["metric"])


if __name__ == "__main__":
    sys.exit(main())
