"""A version is judged where it is served: the whole ensemble, through the server, against golden answers.

Needed are the golden answers, the candidate's manifest, and a way to ask the server; no runtime of either model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import IMAGE_SIDE
from groundglass.errors import ModelError, ParityError
from groundglass.manifest import Manifest
from groundglass_export.answers import Answers
from groundglass_export.gate import Comparison, GateReport, GateScan, same_decision, verify
from groundglass_export.gate.comparison import slice_digest
from groundglass_export.gate.evidence import write_evidence
from groundglass_export.golden import Golden, GoldenScan

Ask = Callable[[NDArray[np.int16]], Answers]
"""Sends slices, int16 (n, rows, columns), HU, through a server, and gives its answers; their probability is None."""

_DIGITS_SHOWN = 12


class AsScanned:
    """What stands in for ``preprocess`` where engines are given Hounsfield units: the slice as it is."""

    def image(self, hu: NDArray[np.int16]) -> NDArray[np.int16]:
        """int16 (rows, columns) -> the same, in one piece and in this machine's byte order."""
        return np.ascontiguousarray(hu, dtype=np.int16)


@dataclass(frozen=True, slots=True)
class ScanEngine:
    """The candidate: whatever ``ask`` reaches.

    Its ``precision`` and ``digest`` are what its manifest says. Through a server nothing else can be seen of it, so
    the limits that it is held to are believed here, and proved only where its file is.
    """

    name: str
    precision: str
    digest: str
    ask: Ask

    def answers(self, slices: NDArray[np.int16], /) -> Answers:
        """Raises what ``ask`` raises, and ModelError for masks of another shape than the contract's."""
        found = self.ask(slices)
        expected = (len(slices), IMAGE_SIDE, IMAGE_SIDE)
        if found.mask.shape != expected:
            raise ModelError(f"{self.name} answered masks of shape {found.mask.shape}; expected {expected}")
        return found


class GoldenEngine:
    """The reference, out of the record. A slice is found by its Hounsfield units, whatever it is called."""

    def __init__(self, golden: Golden) -> None:
        self.name, self.precision, self.digest = golden.file, golden.reference.role, golden.reference.sha256
        self._places = {
            digest: (scan, index) for scan in golden.scans for index, digest in enumerate(scan.slices_sha256)
        }

    def answers(self, slices: NDArray[np.int16], /) -> Answers:
        """int16 (n, rows, columns), HU. Raises ModelError for a slice that was not recorded."""
        rows = [self._answer(hu) for hu in slices]
        return Answers(
            mask=np.concatenate([row.mask for row in rows]),
            pixels=np.concatenate([row.pixels for row in rows]),
            positive=np.concatenate([row.positive for row in rows]),
            probability=None,
        )

    def _answer(self, hu: NDArray[np.int16]) -> Answers:
        digest = slice_digest(hu)
        if digest not in self._places:
            raise ModelError(f"there is no golden answer to a slice of SHA-256 {digest[:_DIGITS_SHOWN]}")
        scan, index = self._places[digest]
        return scan.answer(index)


def verify_served(
    golden: Golden,
    candidate: Manifest,
    ask: Ask,
    scans: Sequence[GateScan],
    *,
    evidence: Path,
    name: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GateReport:
    """Hold the version that ``ask`` reaches, whose manifest is ``candidate``, to the golden answers.

    ``scans`` are those recorded, under their names. ``name`` is what reports call the version; its file's by default.
    ``parity.json`` and ``worst_slice.png`` go to the folder ``evidence``; the report may say that it failed. It has no
    probabilities to compare, and says so in a note.

    Raises ParityError when nothing can be compared: golden answers of a reference that the candidate doesn't come from,
    other thresholds or another window, other slices than those recorded. Raises what ``ask`` raises, and ModelError
    when the evidence can't be written.
    """
    _require_descent(golden, candidate)
    calibration = same_decision(golden, candidate)
    engine = ScanEngine(name or candidate.file, candidate.precision, candidate.model_sha256, ask)
    comparison = Comparison(GoldenEngine(golden), engine, AsScanned(), _as_recorded(golden, scans))
    report = verify(comparison, calibration=calibration, progress=progress)
    write_evidence(report, comparison, evidence)
    return report


def _require_descent(golden: Golden, candidate: Manifest) -> None:
    known = {source.sha256: source for source in (*candidate.sources, candidate.as_source())}
    if golden.reference.sha256 in known:
        return
    sources = ", ".join(f"{source.role} {source.file} ({digest[:_DIGITS_SHOWN]})" for digest, source in known.items())
    raise ParityError(
        f"the golden answers are those of {golden.file} ({golden.reference.sha256[:_DIGITS_SHOWN]}), from which "
        f"{candidate.file} does not come: {sources}; record golden answers of the FP32 graph that it was made from"
    )


def _as_recorded(golden: Golden, scans: Sequence[GateScan]) -> list[GateScan]:
    """The scans in the order of the record, each slice held to its digest when it is asked for."""
    given = {scan.name: scan for scan in scans}
    found = sorted((scan.name, scan.count) for scan in scans)
    expected = sorted((scan.name, scan.count) for scan in golden.scans)
    if found != expected:
        raise ParityError(
            f"the golden answers are of {_listed(expected)}; given were {_listed(found)}: give what was recorded"
        )
    return [_checked(recorded, given[recorded.name]) for recorded in golden.scans]


def _listed(scans: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count} slices)" for name, count in scans) or "no scan"


def _checked(recorded: GoldenScan, scan: GateScan) -> GateScan:
    def hu(index: int) -> NDArray[np.int16]:
        found = scan.hu(index)
        digest, expected = slice_digest(found), recorded.slices_sha256[index]
        if digest != expected:
            made = "its phantom is made otherwise here" if recorded.phantom is not None else "give the same study"
            raise ParityError(
                f"{scan.name} slice {index} is not the slice that the golden answers were recorded of: SHA-256 "
                f"{digest[:_DIGITS_SHOWN]}, expected {expected[:_DIGITS_SHOWN]}; {made}, or record them again"
            )
        return found

    return replace(scan, hu=hu)
