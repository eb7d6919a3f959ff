"""A session: one study through the server, from slices on disk to the scan verdict.

The pipeline decodes and sends; this is what the answers become. The verdict is the server's; when its state was lost (a
restart, an eviction, a retry), or lies on several servers, the slice verdicts already held are folded again by the
aggregator of any of them in one small request. Either way it is compared with the client's own fold, so that a wrong
verdict can't pass.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import IMAGE_SIDE, MASK_ROW_BYTES
from groundglass.errors import NoSeries, ServerError
from groundglass.finding import ScanFinding, longest_run_span
from groundglass.report import ScanReport, SliceResult
from groundglass.study import Study
from groundglass_client.asking import Asking
from groundglass_client.chunk import DecodeHu
from groundglass_client.pipeline import Pipeline
from groundglass_client.requests import ChunkAnswer, fold_request, read_finding
from groundglass_client.settings import DEFAULT_SETTINGS, SessionSettings
from groundglass_client.spans import ChunkSpan
from groundglass_client.transport import ServedScan, Transport

__all__ = ["ScanAnalysis", "SessionSettings", "analyse"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScanAnalysis:
    """The report; the lesion masks when they were asked for: uint8 (n, 512, 64), head to feet, 1 bit a pixel,
    big-endian bits; and where the time went, chunk by chunk in the order of their answers.
    """

    report: ScanReport
    masks: NDArray[np.uint8] | None
    spans: tuple[ChunkSpan, ...]


def analyse(
    study: Study,
    transport: Transport,
    decode_hu: DecodeHu,
    settings: SessionSettings = DEFAULT_SETTINGS,
    on_slices: Callable[[int], None] = lambda count: None,
) -> ScanAnalysis:
    """Send ``study`` through the server behind ``transport`` and return its report.

    ``on_slices`` is called with the number of slices of each answer, from this thread. Raises ServerUnreachable when
    the server stays away longer than the settings allow, ServerRefused when it refuses, and what ``decode_hu``
    raises. The first failure wins: everything else is cancelled.
    """
    started = time.monotonic()
    asking = Asking(settings, started)
    scan = _Scan(transport, settings, asking)
    served = scan.described()
    pipeline = Pipeline(transport, decode_hu, settings, asking, started)
    rows = _Rows.of(len(study.slices), masks=settings.masks)
    spans: list[ChunkSpan] = []
    finding: ScanFinding | None = None
    with closing(pipeline.run(study.slices)) as answers:
        for answered in answers:
            rows.put(answered.answer)
            spans.append(answered.span)
            finding = answered.answer.finding if answered.answer.finding.complete else finding
            on_slices(answered.span.slices)
    kept = _without_bad_slices(study, pipeline)
    rows = rows.only([source.index for source in kept.slices])
    finding = scan.verdict(finding, rows.positive)
    report = _report(kept, rows, finding, scan.confirmed(served), time.monotonic() - started)
    return ScanAnalysis(report, rows.masks, tuple(spans))


class _Scan:
    """What is asked of the server about the scan as a whole."""

    def __init__(self, transport: Transport, settings: SessionSettings, asking: Asking) -> None:
        self._transport = transport
        self._settings = settings
        self._asking = asking

    def described(self) -> ServedScan:
        """What the server says of itself, once it can be reached."""
        patience_s = self._settings.connect_timeout_s
        return self._asking.until_answered(
            lambda timeout_s: self._transport.describe(min(timeout_s, patience_s)), patience_s
        )

    def verdict(self, finding: ScanFinding | None, positive: NDArray[np.bool_]) -> ScanFinding:
        """The server's verdict on the whole scan, compared with our own fold of its slice verdicts, bool (n,)."""
        if finding is None:
            log.info("the server does not hold all of this scan: its slice verdicts are folded again")
            finding = self._fold(positive)
        start, end = longest_run_span(positive)
        if not finding.complete or finding.longest_run != end - start:
            raise ServerError(
                f"the server found a longest run of {finding.longest_run} over {finding.slices_seen} slices, the slice "
                f"verdicts that it sent hold {end - start} over {len(positive)}: its scan_aggregator is broken"
            )
        return finding

    def confirmed(self, served: ServedScan) -> ServedScan:
        """``served`` with the model version that answers now added, when that is another one: a mixture is never
        silent.
        """
        try:
            version_now = self._transport.describe(self._settings.connect_timeout_s).model_version
        except ServerError as error:
            log.warning("the model version could not be confirmed after the last answer: %s", error)
            return served
        versions = sorted({*served.model_version.split(" and "), *version_now.split(" and ")})
        return ServedScan(" and ".join(versions), served.positive_run)

    def _fold(self, positive: NDArray[np.bool_]) -> ScanFinding:
        slices = len(positive)

        def ask(timeout_s: float) -> ScanFinding:
            request = fold_request(positive, secrets.token_hex(16))
            return read_finding(self._asking.answer(self._transport.send(request, timeout_s)), slices, slices)

        return self._asking.until_answered(ask, self._settings.recovery_s)


def _without_bad_slices(study: Study, pipeline: Pipeline) -> Study:
    """The study with the slices that could not be decoded counted in ``refused``; the others keep their index."""
    if not pipeline.bad:
        return study
    slices = tuple(source for source in study.slices if source.index not in pipeline.bad)
    if not slices:
        raise NoSeries(f"none of the {len(study.slices)} slices could be decoded: {pipeline.bad[0].reason}")
    refused = (*study.refused, *(pipeline.bad[index] for index in sorted(pipeline.bad)))
    return replace(study, slices=slices, refused=refused)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Slice verdicts of a whole scan, head to feet: int32 (n,), bool (n,), uint8 (n, 512, 64) or None."""

    lesion_pixels: NDArray[np.int32]
    positive: NDArray[np.bool_]
    masks: NDArray[np.uint8] | None

    @classmethod
    def of(cls, slices: int, *, masks: bool) -> _Rows:
        """Room for a scan. Memory of masks is only taken as they come."""
        return cls(
            np.zeros(slices, dtype=np.int32),
            np.zeros(slices, dtype=np.bool_),
            np.zeros((slices, IMAGE_SIDE, MASK_ROW_BYTES), dtype=np.uint8) if masks else None,
        )

    def put(self, answer: ChunkAnswer) -> None:
        """Put a chunk's rows in their places."""
        self.lesion_pixels[answer.indices] = answer.lesion_pixels
        self.positive[answer.indices] = answer.positive
        if self.masks is not None and answer.masks is not None:
            self.masks[answer.indices] = answer.masks

    def only(self, indices: list[int]) -> _Rows:
        """The rows of these slices, in their order."""
        if len(indices) == len(self.positive):
            return self
        masks = None if self.masks is None else self.masks[indices]
        return _Rows(self.lesion_pixels[indices], self.positive[indices], masks)


def _report(kept: Study, rows: _Rows, finding: ScanFinding, served: ServedScan, seconds: float) -> ScanReport:
    start, end = longest_run_span(rows.positive)
    return ScanReport(
        study=kept,
        slices=tuple(
            SliceResult(replace(source, index=index), int(rows.lesion_pixels[index]), bool(rows.positive[index]))
            for index, source in enumerate(kept.slices)
        ),
        scan_positive=finding.positive,
        longest_run=finding.longest_run,
        run_start=start if end > start else None,
        positive_run=served.positive_run,
        model_version=served.model_version,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        groundglass_version=version("groundglass"),
        seconds=seconds,
    )
