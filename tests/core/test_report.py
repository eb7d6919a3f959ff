"""The report's JSON keeps its published schema."""

import json
from pathlib import Path

import jsonschema
import pytest

from groundglass.report import ScanReport, SliceResult, to_json
from groundglass.study import Gap, Refusal, Series, SliceSource, Study

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())


def report(position_mm: float | None, spacing_mm: tuple[float, float] | None) -> ScanReport:
    """A report with something in every field."""
    series = Series("CT", "1.2.3", 4, 2, 512, 512, "1.2.840.10008.1.2.4.70", spacing_mm, None, None)
    slices = tuple(SliceSource(index, Path(f"{index}"), f"{index}", 0, 512, 512, position_mm) for index in range(2))
    study = Study(
        Path("study"), series, slices,
        gaps=(Gap(0, 0.0, -6.0, 6.0),),
        duplicates=(Refusal("b", "same position as a"),),
        refused=(Refusal("c", "truncated"),),
        ignored=(Refusal("DICOMDIR", "a directory"),),
        other_series=(series,),
    )  # fmt: skip
    results = (SliceResult(slices[0], 12, False), SliceResult(slices[1], 300, True))
    return ScanReport(study, results, False, 1, 1, 15, "1", "2026-01-01T00:00:00+00:00", "0.1.0", 1.5)


@pytest.mark.parametrize(("position_mm", "spacing_mm"), [(-1.5, (0.7, 0.7)), (None, None)], ids=["dicom", "images"])
def test_json_keeps_the_schema(position_mm: float | None, spacing_mm: tuple[float, float] | None) -> None:
    """A report of DICOM slices and one of plain images both validate, as text that was written and read again."""
    jsonschema.validate(json.loads(json.dumps(to_json(report(position_mm, spacing_mm)))), SCHEMA)


def test_schema_refuses_a_field_that_it_does_not_know() -> None:
    """An undocumented field fails the check, so that the schema can't fall behind."""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(to_json(report(0.0, None)) | {"surprise": 1}, SCHEMA)


def test_a_partial_verdict_says_so() -> None:
    """Refused files show in the verdict's words."""
    assert report(None, None).verdict == "negative (partial: 1 files refused)"
