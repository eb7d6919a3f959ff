"""Golden answers are recorded where the reference runs, once, and only of a reference whose answers belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from groundglass.errors import ModelError, ParityError
from groundglass.manifest import file_digest
from groundglass_export.answers import Answers
from groundglass_export.derivation import Reference
from groundglass_export.engine import OnnxEngine, OnnxPreprocess
from groundglass_export.gate import LIMITS, GateScan
from groundglass_export.gate.coherence import Coherence
from groundglass_export.gate.comparison import require_scans, slice_digest
from groundglass_export.golden import Golden, GoldenScan, write_golden
from groundglass_export.provenance import current_versions

PACKAGES = ("groundglass", "onnxruntime", "numpy")


def record_golden(
    reference: Reference,
    preprocess: Path,
    scans: Sequence[GateScan],
    out: Path,
    *,
    phantoms: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Golden:
    """Write to ``out`` what ``reference`` says of every slice of ``scans``, slice by slice.

    ``phantoms`` gives the settings of those scans that are phantoms, by name. ``progress`` is called with slices done
    and slices in all. Raises ParityError for a reference that contradicts itself or its manifest, and for scans in
    which it finds no positive slice, since they prove nothing; ModelError when it can't run or ``out`` can't be
    written.
    """
    require_scans(scans)
    recorder = _Recorder(reference, preprocess, sum(scan.count for scan in scans), progress)
    recorded = tuple(recorder.scan(scan, (phantoms or {}).get(scan.name)) for scan in scans)
    recorder.require_sense()
    golden = Golden(
        reference=reference.manifest.as_source(),
        preprocess_sha256=file_digest(preprocess),
        calibration=reference.manifest.calibration,
        window_hu=reference.manifest.window_hu,
        versions=current_versions(PACKAGES),
        scans=recorded,
    )
    write_golden(golden, out)
    return golden


class _Recorder:
    """Asks the reference, one slice at a time, and watches whether what it says makes sense."""

    def __init__(
        self, reference: Reference, preprocess: Path, total: int, progress: Callable[[int, int], None]
    ) -> None:
        self._reference = reference
        self._engine, self._preprocess = OnnxEngine(reference.path), OnnxPreprocess(preprocess)
        self._coherence, self._positive = Coherence(), 0
        self._done, self._total, self._progress = 0, total, progress

    def scan(self, scan: GateScan, phantom: Mapping[str, Any] | None) -> GoldenScan:
        """The answers to one scan."""
        digests, answers = zip(*(self._slice(scan, index) for index in range(scan.count)), strict=True)
        return GoldenScan(
            name=scan.name,
            slices_sha256=digests,
            masks=np.concatenate([np.packbits(answer.mask, axis=2) for answer in answers]),
            pixels=np.concatenate([answer.pixels for answer in answers]),
            positive=np.concatenate([answer.positive for answer in answers]),
            phantom=phantom,
        )

    def require_sense(self) -> None:
        """Raise ParityError when the answers so far can't be what others are held to."""
        who, tolerance = self._engine.name, LIMITS["fp32"].threshold_tolerance
        complaints = list(self._coherence.complaints(who, self._coherence, self._reference.calibration, tolerance))
        if complaints:
            shown = "; ".join(complaint.text for complaint in complaints)
            raise ParityError(f"{self._reference.path} contradicts itself or its manifest, nothing recorded: {shown}")
        if not self._positive:
            raise ParityError(
                f"{self._reference.path} finds no positive slice in these {self._done}: they would prove nothing; "
                "record scans with lesions"
            )

    def _slice(self, scan: GateScan, index: int) -> tuple[str, Answers]:
        hu = scan.hu(index)
        try:
            answer = self._engine.answers(self._preprocess.image(hu)[None])
        except ModelError as error:
            raise ModelError(f"{scan.name} slice {index}: {error}") from error
        self._coherence.take([(scan.name, index)], answer)
        self._positive += int(answer.positive[0])
        self._done += 1
        self._progress(self._done, self._total)
        return slice_digest(hu), Answers(answer.mask, answer.pixels, answer.positive, None)
