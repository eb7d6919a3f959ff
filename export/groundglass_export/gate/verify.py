"""The comparison: both engines over every slice of every scan, a few slices in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Final, Protocol

import numpy as np

from groundglass.errors import ParityError, SettingError
from groundglass.finding import fold
from groundglass_export.answers import Engine, Given
from groundglass_export.calibration import Calibration
from groundglass_export.gate.batching import batch_complaints
from groundglass_export.gate.coherence import Coherence, Complaint
from groundglass_export.gate.comparison import Comparison, GateScan, ask, require_scans, slice_bytes
from groundglass_export.gate.figures import SliceKey, SliceParity, compare_slice, figures_of
from groundglass_export.gate.judge import judge, notes_on
from groundglass_export.gate.limits import LIMITS, GateLimits
from groundglass_export.gate.report import EngineIdentity, GateReport, ScanParity

DEFAULT_BATCH: Final = 4


class Decision(Protocol):
    """What states by which thresholds and on which window a model decides: a manifest, or golden answers."""

    @property
    def file(self) -> str:
        """Name of the model file."""

    @property
    def calibration(self) -> Mapping[str, float]:
        """Thresholds of mask and verdict, as :class:`Calibration` names them."""

    @property
    def window_hu(self) -> Mapping[str, float]:
        """Centre and width, in Hounsfield units."""


def same_decision(reference: Decision, candidate: Decision) -> Calibration:
    """The thresholds and the window that both state.

    Raises ParityError where they don't state the same, and CheckpointError for thresholds that are none.
    """
    for what, expected, found in (
        ("thresholds", reference.calibration, candidate.calibration),
        ("window", reference.window_hu, candidate.window_hu),
    ):
        if dict(expected) != dict(found):
            raise ParityError(
                f"{candidate.file} states the {what} {dict(found)}, its reference {reference.file} {dict(expected)}: "
                "they decide otherwise by design; export the candidate again from this reference"
            )
    if set(reference.calibration) != {field.name for field in fields(Calibration)}:
        raise ParityError(f"{reference.file} states no thresholds: {dict(reference.calibration)}; export it again")
    return Calibration(**reference.calibration)  # type: ignore[arg-type]  # a mapping read from JSON


def verify(
    comparison: Comparison,
    limits: GateLimits | None = None,
    *,
    calibration: Calibration | None = None,
    batch: int = DEFAULT_BATCH,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GateReport:
    """Compare candidate and reference, ``batch`` slices at a time; the batch size changes no figure.

    ``limits`` are by default those of the candidate's precision. ``calibration`` (see :func:`same_decision`) is what
    both engines must be seen to decide by; without one they are held to each other. ``progress`` is called with slices
    done and slices in all.

    Raises ParityError when nothing can be compared: no slices, a reference that is not FP32, an engine that fails on a
    batch; SettingError for a batch below 1. Everything else that is wrong is a complaint of the report.
    """
    limits = limits or _limits_of(comparison.candidate)
    _require_work(comparison, batch)
    tally = _Tally(comparison)
    total = sum(scan.count for scan in comparison.scans)
    for done in tally.run(batch):
        progress(done, total)
    scans = tuple(tally.scan_parity(scan) for scan in comparison.scans)
    complaints = (*judge(tally.slices, scans, limits), *tally.incoherences(limits, calibration))
    return GateReport(
        reference=_identity(comparison.reference),
        candidate=_identity(comparison.candidate),
        limits=limits,
        slices_sha256=tally.digest.hexdigest(),
        overall=figures_of(tally.slices),
        scans=scans,
        slices=tuple(tally.slices),
        complaints=complaints or tuple(batch_complaints(comparison, tally.slices, limits)),
        notes=tuple(
            notes_on(tally.slices, scans, limits, same_file=comparison.reference.digest == comparison.candidate.digest)
        ),
    )


class _Tally:
    """Gathers what the report needs while slices pass; it keeps numbers of each slice, and no pixels."""

    def __init__(self, comparison: Comparison) -> None:
        self.slices: list[SliceParity] = []
        self.digest = hashlib.sha256()
        self._comparison = comparison
        self._reference, self._candidate = Coherence(), Coherence()

    def run(self, batch: int) -> Iterator[int]:
        """Compare everything; gives the number of slices done after each batch."""
        for scan in self._comparison.scans:
            self.digest.update(f"scan of {scan.count}\n".encode())
            for start in range(0, scan.count, batch):
                keys = [(scan.name, index) for index in range(start, min(start + batch, scan.count))]
                self._take(keys, np.stack([self._image(scan, index) for _, index in keys]))
                yield len(self.slices)

    def scan_parity(self, scan: GateScan) -> ScanParity:
        """The slices of one scan, once all were compared."""
        slices = [item for item in self.slices if item.scan == scan.name]
        return ScanParity(
            scan.name,
            figures_of(slices),
            fold(((item.index, item.reference_positive) for item in slices), scan.count),
            fold(((item.index, item.candidate_positive) for item in slices), scan.count),
        )

    def incoherences(self, limits: GateLimits, calibration: Calibration | None) -> Iterator[Complaint]:
        """Where an engine contradicts itself or the thresholds."""
        for who, coherence in (("reference", self._reference), ("candidate", self._candidate)):
            yield from coherence.complaints(who, self._reference, calibration, limits.threshold_tolerance)

    def _image(self, scan: GateScan, index: int) -> Given:
        hu = scan.hu(index)
        self.digest.update(slice_bytes(hu))
        return self._comparison.preprocess.image(hu)

    def _take(self, keys: list[SliceKey], images: Given) -> None:
        expected = ask(self._comparison.reference, keys, images)
        found = ask(self._comparison.candidate, keys, images)
        self._reference.take(keys, expected)
        self._candidate.take(keys, found)
        self.slices.extend(compare_slice(key, expected.row(row), found.row(row)) for row, key in enumerate(keys))


def _limits_of(candidate: Engine) -> GateLimits:
    if candidate.precision not in LIMITS:
        raise ParityError(
            f"{candidate.name} is of precision {candidate.precision}; there are limits for {', '.join(LIMITS)}"
        )
    return LIMITS[candidate.precision]


def _require_work(comparison: Comparison, batch: int) -> None:
    if batch < 1:
        raise SettingError(f"a batch of {batch} slices asked for; it takes at least 1")
    reference = comparison.reference
    if reference.precision != "fp32":
        raise ParityError(
            f"the reference {reference.name} is of precision {reference.precision}; the gate compares with FP32"
        )
    require_scans(comparison.scans)


def _identity(engine: Engine) -> EngineIdentity:
    return EngineIdentity(engine.name, engine.precision, engine.digest)
