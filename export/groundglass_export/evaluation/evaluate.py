"""Asking a model for every slice of a labelled set, and holding its answers against the truth."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import POSITIVE_RUN
from groundglass.errors import ModelError
from groundglass.finding import fold, longest_run
from groundglass.study import SliceSource
from groundglass_export.evaluation.metrics import ScanOutcome, SliceOutcome
from groundglass_export.evaluation.opening import LabelledScan, LabelledSource
from groundglass_export.evaluation.prediction import DecodeHu, ModelIdentity, Predictions, Predictor


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Every slice and every scan that has a verdict, in the order of the set.

    ``slices_sha256`` is the digest of what was asked and of the truth: Hounsfield units, labels, masks. Two evaluations
    with the same digest are of the same slices.
    """

    model: ModelIdentity
    slices: tuple[SliceOutcome, ...]
    scans: tuple[ScanOutcome, ...]
    slices_sha256: str


def evaluate(
    sources: Sequence[LabelledSource],
    predictor: Predictor,
    decode_hu: DecodeHu,
    on_slices: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Ask ``predictor`` for every slice. ``on_slices`` is called with the number of slices newly answered.

    Scans of fewer than 15 slices, and single images, have no scan verdict. Raises what ``decode_hu`` and the predictor
    raise, and ModelError for answers that contradict themselves.
    """
    slices: list[SliceOutcome] = []
    scans: list[ScanOutcome] = []
    digest = hashlib.sha256()
    for source in sources:
        for scan in source.scans:
            seen = _Seen(decode_hu)
            predictions = predictor.predict(scan.study, seen, on_slices)
            outcomes = list(_slice_outcomes(source.source.name, scan, predictions))
            slices.extend(outcomes)
            if scan.is_scan and len(outcomes) >= POSITIVE_RUN:
                scans.append(_scan_outcome(source.source.name, scan, outcomes))
            for line in _digest_lines(scan, seen):
                digest.update(line)
    return Evaluation(predictor.identity(), tuple(slices), tuple(scans), digest.hexdigest())


class _Seen:
    """Decodes, and remembers the digest of each slice; threads may share it."""

    def __init__(self, decode_hu: DecodeHu) -> None:
        self._decode_hu = decode_hu
        self.digests: dict[int, bytes] = {}

    def __call__(self, source: SliceSource) -> NDArray[np.int16]:
        hu = self._decode_hu(source)
        content = hashlib.sha256(f"{hu.shape}".encode())
        content.update(np.ascontiguousarray(hu, dtype="<i2").data)
        self.digests[source.index] = content.digest()
        return hu


def _slice_outcomes(source: str, scan: LabelledScan, predictions: Predictions) -> Iterator[SliceOutcome]:
    _require_coherent(scan, predictions)
    for place, item in enumerate(scan.study.slices):
        expert = None if scan.masks is None else scan.masks[place]
        yield SliceOutcome(
            source=source,
            scan=scan.name,
            group=scan.groups[place],
            index=place,
            file=item.file,
            label=scan.labels[place],
            positive=bool(predictions.positive[place]),
            pixels=int(predictions.pixels[place]),
            expert_pixels=None if expert is None else _set_bits(expert),
            common_pixels=None if expert is None else _set_bits(expert & predictions.masks[place]),
        )


def _require_coherent(scan: LabelledScan, predictions: Predictions) -> None:
    rows = len(scan.study.slices)
    if not rows == len(predictions.masks) == len(predictions.pixels) == len(predictions.positive):
        raise ModelError(f"{scan.name}: {len(predictions.masks)} answers came to {rows} slices")
    for place, (mask, pixels) in enumerate(zip(predictions.masks, predictions.pixels, strict=True)):
        if _set_bits(mask) != pixels:
            raise ModelError(
                f"{scan.name}, slice {place}: the model counts {pixels} lesion pixels in a mask of {_set_bits(mask)}; "
                "export it again"
            )


def _scan_outcome(source: str, scan: LabelledScan, outcomes: Sequence[SliceOutcome]) -> ScanOutcome:
    finding = fold(((item.index, item.positive) for item in outcomes), len(outcomes))
    known = scan.scan_positive
    return ScanOutcome(
        source=source,
        scan=scan.name,
        slices=len(outcomes),
        label=longest_run(np.array(scan.labels)) >= POSITIVE_RUN if known is None else known,
        longest_run=finding.longest_run,
        positive=finding.positive,
    )


def _digest_lines(scan: LabelledScan, seen: _Seen) -> Iterator[bytes]:
    yield f"scan of {len(scan.labels)}, truth {scan.scan_positive}\n".encode()
    for place, item in enumerate(scan.study.slices):
        yield f"slice {scan.labels[place]:d}\n".encode()
        yield seen.digests[item.index]
        if scan.masks is not None:
            yield scan.masks[place].tobytes()


def _set_bits(packed: NDArray[np.uint8]) -> int:
    return int(np.unpackbits(packed).sum())
