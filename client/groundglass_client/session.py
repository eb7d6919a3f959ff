"""A session: one study through the server, from slices on disk to the scan verdict.

The pipeline decodes and sends; this is what the answers become. The verdict is the server's; when its state was lost (a
restart, an eviction, a retry), or lies on several servers, the slice verdicts already held are folded again by the
aggregator of any of them in one small request. Either way it is compared with the client's own fold, so that a wrong
verdict can't pass. One version of the network answers all of it, or it is computed again on another.
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
from typing import Final

import numpy as np
from numpy.typing import NDArray

from groundglass.errors import DeadlinePassed, NoSeries, ServerError, VersionGone
from groundglass.finding import ScanFinding, longest_run_span
from groundglass.report import ScanReport, SliceResult
from groundglass.study import Study
from groundglass_client.asking import Asking
from groundglass_client.choice import Choice, choose
from groundglass_client.chunk import DecodeHu
from groundglass_client.pipeline import Pipeline
from groundglass_client.requests import fold_request, read_finding
from groundglass_client.rows import Rows
from groundglass_client.settings import DEFAULT_SETTINGS, SessionSettings
from groundglass_client.spans import ChunkSpan
from groundglass_client.transport import ServedScan, Transport

__all__ = ["ScanAnalysis", "SessionSettings", "analyse"]

log = logging.getLogger(__name__)

MOST_ATTEMPTS: Final = 5
"""How often a study is begun when versions are taken from under it: who swaps faster than that has another problem."""


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

    One model version answers every slice: when it is taken away, or another becomes live where versions can't be asked
    for by name, the study is computed again from its first slice. ``on_slices`` is called with the number of slices of
    each answer, from this thread, and with a negative number for answers that no longer count.

    Raises ServerUnreachable when the server stays away longer than the settings allow, ServerRefused when it refuses,
    VersionGone when it does not serve the version that the settings ask for, DeadlinePassed, ServerError when versions
    change faster than the study is computed, and what ``decode_hu`` raises. The first failure wins: everything else is
    cancelled.
    """
    return _Session(study, transport, decode_hu, settings, _Progress(on_slices), time.monotonic()).analysed()


class _Progress:
    """Tells how many slices are answered, and takes back what no longer counts."""

    def __init__(self, on_slices: Callable[[int], None]) -> None:
        self._on_slices = on_slices
        self._done = 0

    def add(self, slices: int) -> None:
        """So many more are answered."""
        self._done += slices
        self._on_slices(slices)

    def undo(self) -> None:
        """None is answered."""
        if self._done:
            self._on_slices(-self._done)
        self._done = 0


@dataclass(frozen=True, slots=True)
class _Session:
    study: Study
    transport: Transport
    decode_hu: DecodeHu
    settings: SessionSettings
    progress: _Progress
    started: float

    def analysed(self) -> ScanAnalysis:
        """The study, computed until one version has answered all of it."""
        failed: tuple[Choice, ServerError] | None = None
        attempt, canary = 1, True
        while True:
            scan = _Scan(self.transport, self.settings, Asking(self.settings, self.started))
            served = scan.described(self.settings.recovery_s if failed else self.settings.connect_timeout_s)
            choice = choose(served, self.settings, self.study, canary=canary)
            _warn(failed, choice)
            try:
                return self._computed(scan, served, choice)
            except ServerError as error:
                if not _another_may_answer(choice, error):
                    raise
                if attempt == MOST_ATTEMPTS:
                    raise ServerError(
                        f"the study was begun {attempt} times, and each time another model version took over before "
                        f"the verdict: versions change too fast for it. The last time: {error}"
                    ) from error
                failed = choice, error.with_traceback(None)  # which would keep the masks of this attempt
            self.progress.undo()
            attempt, canary = attempt + 1, canary and not choice.candidate

    def _computed(self, scan: _Scan, served: ServedScan, choice: Choice) -> ScanAnalysis:
        """The study, every slice of it by the version of ``choice``. Raises VersionGone when that can't be had."""
        pipeline = Pipeline(
            self.transport, self.decode_hu, self.settings, scan.asking, choice=choice, started=self.started
        )
        rows = Rows.of(len(self.study.slices), masks=self.settings.masks)
        spans: list[ChunkSpan] = []
        finding: ScanFinding | None = None
        with closing(pipeline.run(self.study.slices)) as answers:
            for answered in answers:
                rows.put(answered.answer)
                spans.append(answered.span)
                finding = answered.answer.finding if answered.answer.finding.complete else finding
                self.progress.add(answered.span.slices)
        kept = _without_bad_slices(self.study, pipeline)
        rows = rows.only([source.index for source in kept.slices])
        finding = scan.verdict(finding, rows.positive)
        if not choice.by_name:
            scan.confirm(served)
        answered_by = replace(served, model_version=choice.version)
        report = _report(kept, rows, finding, answered_by, time.monotonic() - self.started)
        return ScanAnalysis(report, rows.masks, tuple(spans))


def _another_may_answer(choice: Choice, error: ServerError) -> bool:
    """Whether the study can still be computed on another version; a candidate's failure is never the study's."""
    return isinstance(error, VersionGone) or (choice.candidate and not isinstance(error, DeadlinePassed))


def _warn(failed: tuple[Choice, ServerError] | None, choice: Choice) -> None:
    if failed is not None:
        log.warning(
            "version %s%s did not answer the whole study, which is computed again on version %s: %s",
            *(failed[0].version, ", a canary," if failed[0].candidate else "", choice.version, failed[1]),
        )


class _Scan:
    """What is asked of the server about the scan as a whole."""

    def __init__(self, transport: Transport, settings: SessionSettings, asking: Asking) -> None:
        self._transport = transport
        self._settings = settings
        self.asking = asking

    def described(self, patience_s: float) -> ServedScan:
        """What the server says of itself, once it can be reached."""
        longest_s = self._settings.connect_timeout_s
        return self.asking.until_answered(
            lambda timeout_s: self._transport.describe(min(timeout_s, longest_s)), patience_s
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

    def confirm(self, served: ServedScan) -> None:
        """Raise VersionGone unless what was live as the study began has been live until now, after its last answer.

        One that came and went on a server in between is not seen: only a version that is asked for by name is proof
        against that.
        """
        now = self.described(self._settings.recovery_s)
        if now.model_version != served.model_version:
            raise VersionGone(f"version {now.model_version} went live in place of version {served.model_version}")
        if now.departures != served.departures:
            raise VersionGone(f"version {served.model_version} is no longer live on every server that answered")

    def _fold(self, positive: NDArray[np.bool_]) -> ScanFinding:
        slices = len(positive)

        def ask(timeout_s: float) -> ScanFinding:
            request = fold_request(positive, secrets.token_hex(16))
            return read_finding(self.asking.answer(self._transport.send(request, timeout_s)), slices, slices)

        return self.asking.until_answered(ask, self._settings.recovery_s)


def _without_bad_slices(study: Study, pipeline: Pipeline) -> Study:
    """The study with the slices that could not be decoded counted in ``refused``; the others keep their index."""
    if not pipeline.bad:
        return study
    slices = tuple(source for source in study.slices if source.index not in pipeline.bad)
    if not slices:
        raise NoSeries(f"none of the {len(study.slices)} slices could be decoded: {pipeline.bad[0].reason}")
    refused = (*study.refused, *(pipeline.bad[index] for index in sorted(pipeline.bad)))
    return replace(study, slices=slices, refused=refused)


def _report(kept: Study, rows: Rows, finding: ScanFinding, served: ServedScan, seconds: float) -> ScanReport:
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
