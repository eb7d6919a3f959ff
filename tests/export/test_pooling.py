"""Pooling the reports of a cross-validation: every slice once, and only what its model never saw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from groundglass.errors import SettingError
from groundglass_export.evaluation import pool_reports
from groundglass_export.evaluation.metrics import ScanOutcome, SliceOutcome


def _report(path: Path, scan: int, *, positive: bool, seen: Mapping[str, str]) -> Path:
    """Two outlined slices of a scan and one healthy slice in ``path``, as ``groundglass evaluate --json`` writes it."""
    slices = [
        SliceOutcome(
            "lesions", f"scan {scan}", f"scan {scan}", place, f"{scan}-{place}.png", True, positive, 100, 100, 50
        )
        for place in range(2)
    ]
    slices.append(SliceOutcome("healthy", "healthy", "healthy", 0, "0.dcm", False, positive, 0))
    scans = [ScanOutcome("lesions", f"scan {scan}", 2, True, 2, positive)]
    content: dict[str, Any] = {
        "schema_version": 1,
        "model": {"way": "model", "name": path.stem},
        "sources": [{"name": name, "seen": value} for name, value in seen.items()],
        "slices": [{**asdict(item), "dice": item.dice} for item in slices],
        "scans": [asdict(item) for item in scans],
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


NEVER = {"lesions": "never", "healthy": "trained on"}


def test_each_model_counts_on_what_it_never_saw(tmp_path: Path) -> None:
    """Slices of both reports are counted together by source; sources that a model was trained on are left out."""
    first = _report(tmp_path / "a.json", 0, positive=True, seen={"lesions": "never", "healthy": "never"})
    second = _report(tmp_path / "b.json", 1, positive=False, seen=NEVER)
    pooled = pool_reports([first, second])
    assert [row.name for row in pooled.rows] == ["lesions", "healthy", "all"]
    lesions, healthy, everything = pooled.rows
    assert (lesions.slices.sensitivity.hits, lesions.slices.sensitivity.total, lesions.slices.groups) == (2, 4, 2)
    assert lesions.dice is not None
    assert lesions.dice.mean.value == pytest.approx(0.5)
    assert (lesions.scans.sensitivity.hits, lesions.scans.sensitivity.total) == (1, 2)
    assert (healthy.slices.specificity.hits, healthy.slices.specificity.total) == (0, 1)
    assert everything.slices.slices == 5
    assert "a.json, b.json" in pooled.as_text()
    assert [report["model"]["name"] for report in pooled.to_json()["reports"]] == ["a", "b"]


def test_a_slice_never_counts_twice(tmp_path: Path) -> None:
    """Two models that were asked about the same slice are refused, by the name of the slice."""
    paths = [_report(tmp_path / name, 0, positive=True, seen=NEVER) for name in ("a.json", "b.json")]
    with pytest.raises(SettingError, match=r"b\.json: 0-0\.png of scan 0 is in .*a\.json too"):
        pool_reports(paths)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "no report"), ("[]", "no report"), ('{"schema_version": 1}', "no report"), ("", "no report")],
)
def test_other_files_are_refused(content: str, words: str, tmp_path: Path) -> None:
    """A file that is no report is refused by name."""
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SettingError, match=rf"other\.json is {words}"):
        pool_reports([path])


def test_a_report_of_seen_sources_only_is_refused(tmp_path: Path) -> None:
    """A model that was trained on all that it was asked about says nothing of new scans."""
    path = _report(tmp_path / "a.json", 0, positive=True, seen={"lesions": "trained on", "healthy": "chosen on"})
    with pytest.raises(SettingError, match=r"a\.json: no source is stated as never seen"):
        pool_reports([path])
