"""Cross-validation: reports of several models, each on what it never saw, as one table.

Every slice counts once, with the answer of the model that was trained without its scan. The models differ, so the
figures say how their recipe does on new scans, and not how one of them does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from groundglass.errors import SettingError
from groundglass_export.evaluation.labelled_set import NEVER
from groundglass_export.evaluation.metrics import (
    ScanOutcome,
    SliceOutcome,
    dice_figures,
    scan_figures,
    slice_figures,
)
from groundglass_export.evaluation.report import SCHEMA_VERSION, EvaluationFigures, figures_to_json
from groundglass_export.evaluation.table import tables

T = TypeVar("T", SliceOutcome, ScanOutcome)

NOT_SEEN: Final = "by its model never"


@dataclass(frozen=True, slots=True)
class PooledReport:
    """Rows by source, and where there are several sources, one of all."""

    files: tuple[str, ...]
    models: tuple[Mapping[str, Any], ...]
    rows: tuple[EvaluationFigures, ...]

    def as_text(self) -> str:
        """For a terminal."""
        table = tables([(row.name, row.seen, row.slices, row.dice, row.scans) for row in self.rows])
        heading = f"{len(self.files)} models, each on what it never saw: {', '.join(self.files)}"
        return "\n".join([heading, "", *table, "Not for diagnosis."])

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "reports": [
                {"file": file, "model": dict(model)} for file, model in zip(self.files, self.models, strict=True)
            ],
            "sources": [figures_to_json(row) for row in self.rows],
            "disclaimer": "Research software. Not for diagnosis.",
        }


def pool_reports(paths: Sequence[Path]) -> PooledReport:
    """Read reports that ``groundglass evaluate --json`` wrote, and count what is stated as never seen.

    Raises SettingError for a file that is no such report, a report without such a source, and a slice that two models
    were asked about: it would count twice.
    """
    slices: dict[tuple[str, str, str], SliceOutcome] = {}
    asked: dict[tuple[str, str, str], Path] = {}
    scans: list[ScanOutcome] = []
    models = []
    for path in paths:
        content = _read(path)
        never = {row["name"] for row in content["sources"] if row["seen"] == NEVER}
        if not never:
            raise SettingError(f"{path}: no source is stated as never seen; there is nothing in it to pool")
        for item in _outcomes(SliceOutcome, content["slices"], never):
            key = (item.source, item.scan, item.file)
            if key in slices:
                raise SettingError(f"{path}: {item.file} of {item.scan} is in {asked[key]} too; it would count twice")
            slices[key], asked[key] = item, path
        scans.extend(_outcomes(ScanOutcome, content["scans"], never))
        models.append(content["model"])
    names = list(dict.fromkeys(item.source for item in slices.values()))
    groups = [[name] for name in names] + ([names] if len(names) > 1 else [])
    rows = [_row(group, list(slices.values()), scans) for group in groups]
    return PooledReport(tuple(path.name for path in paths), tuple(models), tuple(rows))


def _row(names: Sequence[str], slices: Sequence[SliceOutcome], scans: Sequence[ScanOutcome]) -> EvaluationFigures:
    chosen = [item for item in slices if item.source in names]
    return EvaluationFigures(
        name=names[0] if len(names) == 1 else "all",
        kind="pooled",
        seen=NOT_SEEN,
        slices=slice_figures(chosen),
        dice=dice_figures(chosen),
        scans=scan_figures([scan for scan in scans if scan.source in names]),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["schema_version"]
        for key in ("sources", "slices", "scans", "model"):
            content[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{path} is no report of groundglass evaluate: {error!r}") from error
    if version != SCHEMA_VERSION:
        raise SettingError(f"{path} is a report of version {version}; this one reads {SCHEMA_VERSION}")
    return dict(content)


def _outcomes(kind: Callable[..., T], rows: Sequence[Mapping[str, Any]], sources: set[str]) -> Iterator[T]:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for row in rows:
        if row["source"] in sources:
            yield kind(**{name: value for name, value in row.items() if name in names})
