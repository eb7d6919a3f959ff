"""What a scenario gave, as a value that explains itself: figures, tables, charts, judgements; and its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from groundglass.errors import SettingError
from groundglass.publish import published
from groundglass_bench.figures import Figure
from groundglass_bench.scenario import Threshold

FORMAT: Final = "groundglass bench result 1"
REPORT_NAME: Final = "report"
"""The report's own files in the folder of results, ``report.json`` among them."""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are text or numbers, the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart; ``low`` and ``high`` are its spread, as long as ``y`` or empty."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over a common axis. A chart of figures is drawn for every scenario; this is for what needs another axis."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """What a kind of scenario measured. ``absent`` says why something that was to be measured was not."""

    figures: tuple[Figure, ...]
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """A threshold held against its figure. ``word`` is met, missed, not measured, or not judged (a quick run)."""

    threshold: Threshold
    value: float | None
    word: str


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """One scenario, once: what was asked, where, when, and what came of it; ``error`` when nothing did.

    ``started`` is ISO 8601 in UTC, ``seconds`` the whole scenario's wall time, boots included.
    """

    scenario: str
    kind: str
    summary: str
    settings: Mapping[str, Any]
    quick: bool
    host: Mapping[str, Any]
    server: str
    started: str
    seconds: float
    measured: Measured | None
    judgements: tuple[Judgement, ...] = ()
    error: str | None = None

    @property
    def missed(self) -> bool:
        """Whether a threshold was not kept, or could not be judged in a full run."""
        return any(judgement.word in ("missed", "not measured") for judgement in self.judgements)

    def figure(self, name: str) -> Figure | None:
        """The figure of that name, None when it was not measured."""
        figures = self.measured.figures if self.measured else ()
        return next((figure for figure in figures if figure.name == name), None)


def judge(measured: Measured, thresholds: tuple[Threshold, ...], *, quick: bool) -> tuple[Judgement, ...]:
    """Every threshold against the median of its figure; a quick run is too short to be judged."""
    medians = {figure.name: figure.median for figure in measured.figures}
    judgements = []
    for threshold in thresholds:
        value = medians.get(threshold.figure)
        word = "not measured" if value is None else "met" if threshold.keeps(value) else "missed"
        judgements.append(Judgement(threshold, value, "not judged (quick)" if quick else word))
    return tuple(judgements)


def one_line(error: BaseException) -> str:
    """An error as a report lists it."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def write_result(result: ScenarioResult, folder: Path) -> Path:
    """Write ``<scenario>.json``, whole or not at all. Raises SettingError when the folder can't be written."""
    path = folder / f"{result.scenario}.json"
    content = {"format": FORMAT, **asdict(result)}
    if result.measured is not None:
        content["measured"]["figures"] = [figure.to_json() for figure in result.measured.figures]
    try:
        with published(path) as beside:
            beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SettingError(f"{path} can't be written: {error.strerror}") from error
    return path


def read_results(folder: Path) -> list[ScenarioResult]:
    """All results in ``folder``, by name. Raises SettingError for a JSON file there that is none."""
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return [read_result(file) for file in files if file.stem != REPORT_NAME and not file.name.startswith(".")]


def read_result(file: Path) -> ScenarioResult:
    """The result in ``file``. Raises SettingError for what is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        measured = content.pop("measured")
        judgements = content.pop("judgements")
        return ScenarioResult(
            **content,
            measured=None if measured is None else _measured(measured),
            judgements=tuple(
                Judgement(**{**entry, "threshold": Threshold(**entry["threshold"])}) for entry in judgements
            ),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError(f"{file} is no result of this groundglass bench ({type(error).__name__})") from error


def _measured(content: Mapping[str, Any]) -> Measured:
    return Measured(
        figures=tuple(Figure.from_json(figure) for figure in content["figures"]),
        tables=tuple(
            Table(table["title"], tuple(table["columns"]), tuple(map(tuple, table["rows"])))
            for table in content["tables"]
        ),
        charts=tuple(
            Chart(**{**chart, "lines": tuple(_line(line) for line in chart["lines"])}) for chart in content["charts"]
        ),
        absent=content["absent"],
        notes=tuple(content["notes"]),
    )


def _line(content: Mapping[str, Any]) -> Line:
    return Line(content["label"], *(tuple(content[key]) for key in ("x", "y", "low", "high")))
