"""The paper's tables of an evaluation: slices, masks and scans, per source and overall."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any, Final

from groundglass.contract import POSITIVE_RUN
from groundglass_export.evaluation.evaluate import Evaluation
from groundglass_export.evaluation.intervals import CONFIDENCE, METHODS, Estimate, Interval, Share
from groundglass_export.evaluation.labelled_set import NEVER, LabelledSet, SetSource, kind_of
from groundglass_export.evaluation.metrics import (
    DiceFigures,
    ScanFigures,
    SliceFigures,
    dice_figures,
    scan_figures,
    slice_figures,
)
from groundglass_export.evaluation.table import tables

SCHEMA_VERSION: Final = 1
_DIGITS: Final = 6
_DIGEST_SHOWN: Final = 12


@dataclass(frozen=True, slots=True)
class EvaluationFigures:
    """The figures of a source, or of several: ``seen`` says what training saw of them, ``various`` if it differs."""

    name: str
    kind: str
    seen: str
    slices: SliceFigures
    dice: DiceFigures | None
    scans: ScanFigures


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """An evaluation as tables. ``overall`` are all sources, and before it those never seen in training if they are
    some of them. ``notes`` say what a reader must know to weigh the figures.
    """

    labelled: LabelledSet
    evaluation: Evaluation
    sources: tuple[EvaluationFigures, ...]
    overall: tuple[EvaluationFigures, ...]
    notes: tuple[str, ...]
    created: str

    def as_text(self) -> str:
        """For a terminal."""
        model, rows = self.evaluation.model, (*self.sources, *self.overall)
        digest = f" ({model.sha256[:_DIGEST_SHOWN]})" if model.sha256 else ""
        version = f", version {model.version}" if model.version else ""
        lines = [
            f"{model.way} {model.name}{digest}{version}",
            f"set {self.labelled.file} ({self.labelled.sha256[:_DIGEST_SHOWN]}), {len(self.evaluation.slices)} slices, "
            f"SHA-256 {self.evaluation.slices_sha256[:_DIGEST_SHOWN]}",
            "",
            *tables([(row.name, row.seen, row.slices, row.dice, row.scans) for row in rows]),
            f"{CONFIDENCE:.0%} intervals:",
            *(f"  {figure}: {method}" for figure, method in METHODS.items() if "by group" not in figure),
            *(f"note: {note}" for note in self.notes),
            "Not for diagnosis.",
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "created": self.created,
            "model": asdict(self.evaluation.model),
            "set": {
                "file": self.labelled.file,
                "sha256": self.labelled.sha256,
                "slices_sha256": self.evaluation.slices_sha256,
                "checkpoint_sha256": self.labelled.checkpoint_sha256 or None,
            },
            "positive_run": POSITIVE_RUN,
            "confidence": CONFIDENCE,
            "interval_methods": dict(METHODS),
            "sources": [figures_to_json(row) for row in self.sources],
            "overall": [figures_to_json(row) for row in self.overall],
            "scans": [asdict(scan) for scan in self.evaluation.scans],
            "slices": [{**asdict(item), "dice": _rounded(item.dice)} for item in self.evaluation.slices],
            "notes": list(self.notes),
            "disclaimer": "Research software. Not for diagnosis.",
        }


def build_report(labelled: LabelledSet, evaluation: Evaluation) -> EvaluationReport:
    """The tables of ``evaluation``, which was made on ``labelled``."""
    sources = tuple(_figures(source.name, [source], evaluation) for source in labelled.sources)
    return EvaluationReport(
        labelled=labelled,
        evaluation=evaluation,
        sources=sources,
        overall=tuple(_overall(labelled.sources, evaluation)),
        notes=tuple(_notes(labelled, evaluation)),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _overall(sources: Sequence[SetSource], evaluation: Evaluation) -> Iterator[EvaluationFigures]:
    unseen = [source for source in sources if source.seen == NEVER]
    if 0 < len(unseen) < len(sources):
        yield _figures("all never seen", unseen, evaluation)
    yield _figures("all", sources, evaluation)


def _figures(name: str, sources: Sequence[SetSource], evaluation: Evaluation) -> EvaluationFigures:
    names = {source.name for source in sources}
    slices = [item for item in evaluation.slices if item.source in names]
    return EvaluationFigures(
        name=name,
        kind=kind_of(sources[0]) if len(sources) == 1 else "various",
        seen=sources[0].seen if len({source.seen for source in sources}) == 1 else "various",
        slices=slice_figures(slices),
        dice=dice_figures(slices),
        scans=scan_figures([scan for scan in evaluation.scans if scan.source in names]),
    )


def _notes(labelled: LabelledSet, evaluation: Evaluation) -> Iterator[str]:
    model, stated = evaluation.model, labelled.checkpoint_sha256
    if stated and model.checkpoint_sha256 != stated:
        found = f"is of {model.checkpoint_sha256[:_DIGEST_SHOWN]}" if model.checkpoint_sha256 else "does not name one"
        yield f"what was seen in training is stated for checkpoint {stated[:_DIGEST_SHOWN]}; this {model.way} {found}"
    if model.positive_run not in (None, POSITIVE_RUN):
        yield f"the server calls a scan positive from {model.positive_run} slices in a row; here it is {POSITIVE_RUN}"
    if model.version is not None and " and " in model.version:
        yield f"versions {model.version} of the model answered: these are the figures of neither"


def figures_to_json(row: EvaluationFigures) -> dict[str, Any]:
    """A row of the tables, as plain JSON values."""
    return {
        "name": row.name,
        "kind": row.kind,
        "seen": row.seen,
        "slices": {
            "count": row.slices.slices,
            "groups": row.slices.groups,
            "sensitivity": _share(row.slices.sensitivity),
            "specificity": _share(row.slices.specificity),
        },
        "dice": None if row.dice is None else _dice(row.dice),
        "scans": {
            "count": row.scans.scans,
            "sensitivity": _share(row.scans.sensitivity),
            "specificity": _share(row.scans.specificity),
            "f1": _estimate(row.scans.f1),
        },
    }


def _dice(figures: DiceFigures) -> dict[str, Any]:
    return {
        "slices": figures.slices,
        "mean": _estimate(figures.mean),
        "median": _estimate(figures.median),
        "pooled": _estimate(figures.pooled),
        "resampled": figures.resampled,
        "units": figures.units,
    }


def _share(share: Share) -> dict[str, Any]:
    return {
        "hits": share.hits,
        "total": share.total,
        "value": _rounded(share.value),
        "ci95": _interval(share.interval),
        "ci95_by_group": _interval(share.by_group),
    }


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else {"value": _rounded(estimate.value), "ci95": _interval(estimate.interval)}


def _interval(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [_rounded(bound) for bound in interval]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
