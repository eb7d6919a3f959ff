"""The evidence of a comparison, for a person and a program to look at, whether it passed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from groundglass.errors import ModelError
from groundglass.publish import published
from groundglass_export.gate.comparison import Comparison
from groundglass_export.gate.picture import write_picture
from groundglass_export.gate.report import GateReport

REPORT_FILE: Final = "parity.json"
PICTURE_FILE: Final = "worst_slice.png"


def write_evidence(report: GateReport, comparison: Comparison, folder: Path) -> None:
    """``parity.json`` and, of the worst slice, ``worst_slice.png``. Raises ModelError when they can't be written."""
    try:
        with published(folder / REPORT_FILE) as beside:
            beside.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        write_picture(report, comparison, folder / PICTURE_FILE)
    except OSError as error:
        raise ModelError(f"the evidence was not written to {folder}: {error}") from error
