"""Charts of results as PNG files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from groundglass.publish import published
from groundglass_bench.figures import Figure
from groundglass_bench.result import Chart, Line, ScenarioResult

_SIZE_INCH: Final = (6.4, 3.6)
_BAR_INCH: Final = 0.35
_DPI: Final = 120
_COLOURS: Final = ("#1f5f8b", "#d9822b", "#3a7d44", "#8c3a5b")


def write_plots(results: Sequence[ScenarioResult], folder: Path) -> dict[str, list[Path]]:
    """The plots of every scenario that measured something, by its name: its charts, or else its figures as bars."""
    written: dict[str, list[Path]] = {}
    for result in results:
        if result.measured is None:
            continue
        charts = [_lines(chart) for chart in result.measured.charts] or [_bars(result.measured.figures)]
        for number, canvas in enumerate(charts, 1):
            path = folder / f"{result.scenario}-{number}.png"
            with published(path) as beside:
                canvas.savefig(beside, dpi=_DPI)
            written.setdefault(result.scenario, []).append(path)
    return written


def _lines(chart: Chart) -> Canvas:
    canvas, axes = _axes(_SIZE_INCH)
    for line, colour in zip(chart.lines, _COLOURS, strict=False):
        axes.errorbar(line.x, line.y, yerr=_spread(line), label=line.label, color=colour, marker="o", capsize=3)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if len(chart.lines) > 1:
        axes.legend(frameon=False)
    return canvas


def _bars(figures: Sequence[Figure]) -> Canvas:
    """The figures of the most frequent unit, ratios aside; their spread as a line."""
    units = Counter(figure.unit for figure in figures if figure.unit) or Counter([""])
    unit = units.most_common(1)[0][0]
    shown = [figure for figure in figures if figure.unit == unit][::-1]
    canvas, axes = _axes((_SIZE_INCH[0], 1.2 + _BAR_INCH * len(shown)))
    medians = [figure.median for figure in shown]
    spread = [
        [figure.median - figure.smallest for figure in shown],
        [figure.largest - figure.median for figure in shown],
    ]
    axes.barh([figure.name for figure in shown], medians, xerr=spread, color=_COLOURS[0], capsize=3)
    axes.set(xlabel=unit)
    return canvas


def _axes(size_inch: tuple[float, float]) -> tuple[Canvas, Any]:
    canvas = Canvas(figsize=size_inch, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.3)
    axes.set_axisbelow(True)
    return canvas, axes


def _spread(line: Line) -> list[list[float]] | None:
    if not line.low:
        return None
    return [
        [y - low for y, low in zip(line.y, line.low, strict=True)],
        [high - y for y, high in zip(line.y, line.high, strict=True)],
    ]
