"""Writers: what an analysis leaves on disk. Every file appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundglass.publish import published
from groundglass.report import ScanReport, to_json


def report_text(report: ScanReport) -> str:
    """The report as JSON text, as ``docs/report.schema.json`` describes it."""
    return json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"


def write_report(report: ScanReport, path: Path) -> None:
    """Write the report as JSON."""
    with published(path) as beside:
        beside.write_text(report_text(report), encoding="utf-8")


def write_masks(masks: NDArray[np.uint8], path: Path) -> None:
    """Write the lesion masks, uint8 (n, 512, 64) bit-packed, head to feet, as a compressed ``.npz`` with the key
    ``mask``.

    ``numpy.unpackbits(numpy.load(path)["mask"], axis=-1)`` gives uint8 (n, 512, 512).
    """
    with published(path) as beside, beside.open("wb") as stream:
        np.savez_compressed(stream, mask=masks)
