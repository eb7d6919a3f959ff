"""The answer to one study: slice verdicts, the scan verdict, and everything a reader must know to weigh them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from groundglass.study import Gap, Refusal, Series, SliceSource, Study

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class SliceResult:
    """One slice: where it lies and what the network found. ``lesion_pixels`` counts pixels of the 512x512 mask."""

    source: SliceSource
    lesion_pixels: int
    positive: bool


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What ``groundglass analyze`` found in a study.

    ``scan_positive`` is the server's verdict: ``longest_run >= positive_run`` consecutive positive slices.
    ``run_start`` is the index of the first slice of the longest run, None when no slice is positive. ``partial`` is
    true when files were
    refused: slices may be missing from the verdict. ``seconds`` runs from the first request to the verdict.
    """

    study: Study
    slices: tuple[SliceResult, ...]
    scan_positive: bool
    longest_run: int
    run_start: int | None
    positive_run: int
    model_version: str
    created: str
    groundglass_version: str
    seconds: float

    @property
    def slice_count(self) -> int:
        """Slices analysed."""
        return len(self.slices)

    @property
    def partial(self) -> bool:
        """Whether slices that belong to the study may be missing from the verdict."""
        return self.study.partial

    @property
    def verdict(self) -> str:
        """The scan verdict in one word, with its reservation."""
        word = "positive" if self.scan_positive else "negative"
        return f"{word} (partial: {len(self.study.refused)} files refused)" if self.partial else word


def to_json(report: ScanReport) -> dict[str, Any]:
    """The report as plain JSON values, in the form that ``docs/report.schema.json`` describes."""
    study = report.study
    return {
        "schema_version": SCHEMA_VERSION,
        "created": report.created,
        "groundglass_version": report.groundglass_version,
        "model_version": report.model_version,
        "scan_positive": report.scan_positive,
        "partial": report.partial,
        "longest_run": report.longest_run,
        "run_start": report.run_start,
        "positive_run": report.positive_run,
        "slice_count": report.slice_count,
        "positive_slices": sum(result.positive for result in report.slices),
        "seconds": round(report.seconds, 3),
        "series": _series(study.series),
        "slices": [_slice(result) for result in report.slices],
        "gaps": [_gap(gap) for gap in study.gaps],
        "duplicates": [_refusal(refusal) for refusal in study.duplicates],
        "refused": [_refusal(refusal) for refusal in study.refused],
        "ignored": [_refusal(refusal) for refusal in study.ignored],
        "other_series": [_series(series) for series in study.other_series],
        "disclaimer": "Research software. Not for diagnosis.",
    }


def _slice(result: SliceResult) -> dict[str, Any]:
    source = result.source
    return {
        "index": source.index,
        "file": source.file,
        "frame": source.frame,
        "position_mm": None if source.position_mm is None else round(source.position_mm, 3),
        "lesion_pixels": result.lesion_pixels,
        "positive": result.positive,
    }


def _series(series: Series) -> dict[str, Any]:
    return {
        "modality": series.modality,
        "series_instance_uid": series.series_instance_uid,
        "series_number": series.series_number,
        "slice_count": series.slice_count,
        "rows": series.rows,
        "columns": series.columns,
        "transfer_syntax": series.transfer_syntax,
        "pixel_spacing_mm": None if series.pixel_spacing_mm is None else list(series.pixel_spacing_mm),
        "spacing_mm": series.spacing_mm,
        "spacing_range_mm": None if series.spacing_range_mm is None else list(series.spacing_range_mm),
        "tilt_degrees": series.tilt_degrees,
    }


def _gap(gap: Gap) -> dict[str, Any]:
    return {
        "after_index": gap.after_index,
        "from_mm": gap.from_mm,
        "to_mm": gap.to_mm,
        "distance_mm": gap.distance_mm,
    }


def _refusal(refusal: Refusal) -> dict[str, Any]:
    return {"file": refusal.file, "reason": refusal.reason}
