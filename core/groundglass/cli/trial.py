"""The trial of a version through a server: golden study, parity gate, latency. Here client, gate and versions meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from groundglass import contract
from groundglass.cli.slices import golden_scans
from groundglass.cli.terminal import extra, increments, progress
from groundglass.errors import ParityError, RepositoryError, ServerError
from groundglass.manifest import Manifest
from groundglass.tls import TlsSettings

if TYPE_CHECKING:
    from groundglass_client.transport import Transport
    from groundglass_ensemble.versions import Candidate, Check, Trial
    from groundglass_export.answers import Answers
    from groundglass_export.gate import GateReport, GateScan
    from groundglass_export.golden import Golden

GOLDEN: Final = "golden.npz"
LATENCY_SLICES: Final = 4
"""Slices of a request whose latency is compared: enough to outweigh the way there and back."""


@dataclass(frozen=True, slots=True)
class TrialSettings:
    """What a version is tried with.

    golden: golden answers; None for those of the version's folder, of ``unet``, or of another version, that fit.
    studies: what they are of; empty for the phantom that they name. latency_ratio: over the live version, at most.
    evidence: folder for parity.json and a picture of the worst slice. tls: None for plain gRPC.
    """

    repository: Path
    golden: Path | None
    studies: tuple[Path, ...]
    latency_ratio: float
    evidence: Path
    tls: TlsSettings | None = None


def trial_of(settings: TrialSettings) -> Trial:
    """The trial that ``groundglass models verify`` puts every version to, through each server in turn."""

    def trial(candidate: Candidate) -> Sequence[Check]:
        from groundglass_client.connection import connect
        from groundglass_ensemble.versions import Check

        try:
            golden = find_golden(settings, candidate.version, candidate.manifest)
            with (
                golden_scans(golden, settings.studies) as scans,
                connect(candidate.address, shared_memory=False, tls=settings.tls) as transport,
            ):
                report = _compared(settings, candidate, golden, scans, transport)
                hu = np.stack([scans[0].hu(index) for index in range(min(LATENCY_SLICES, scans[0].count))])
                return [*_parity_checks(report), _latency_check(settings, candidate, transport, hu)]
        except (ParityError, RepositoryError, ServerError) as error:  # nothing is proved: no-go, with the reason
            return [Check("golden study", str(error), "answered as its FP32 reference", False)]

    return trial


def find_golden(settings: TrialSettings, version: int, manifest: Manifest) -> Golden:
    """The golden answers of a version's FP32 reference. Raises RepositoryError where there are none that fit."""
    with extra("export"):
        from groundglass_export.golden import read_golden
    if settings.golden is not None:
        return read_golden(settings.golden)
    unet = settings.repository / contract.UNET.name
    places = (unet / str(version) / GOLDEN, unet / GOLDEN, *sorted(unet.glob(f"*/{GOLDEN}")))
    wanted = {source.sha256 for source in manifest.sources} | {manifest.model_sha256}
    for place in dict.fromkeys(places):
        if place.is_file() and (golden := read_golden(place)).reference.sha256 in wanted:
            return golden
    raise RepositoryError(
        f"no golden answers of version {version}'s FP32 reference in {unet}: record them with "
        "`groundglass export golden`, and name them with --golden"
    )


def _compared(
    settings: TrialSettings, candidate: Candidate, golden: Golden, scans: list[GateScan], transport: Transport
) -> GateReport:
    from groundglass_client.trial import ask_version
    from groundglass_export.answers import Answers
    from groundglass_export.served import verify_served

    def ask(hu: NDArray[np.int16]) -> Answers:
        found = ask_version(transport, candidate.version, hu)
        if found.masks is None:
            raise ParityError(f"version {candidate.version} at {candidate.address} answered without masks")
        return Answers(np.unpackbits(found.masks, axis=2).view(np.bool_), found.lesion_pixels, found.positive, None)

    with progress("comparing", sum(scan.count for scan in scans)) as advance:
        show = increments(advance)
        return verify_served(
            golden,
            candidate.manifest,
            ask,
            scans,
            evidence=settings.evidence,
            name=f"version {candidate.version}",
            progress=lambda done, total: show(done),
        )


def _parity_checks(report: GateReport) -> Iterator[Check]:
    from groundglass_ensemble.versions import Check

    figures, limits = report.overall, report.limits
    complaints = "; ".join(complaint.text for complaint in report.complaints)
    yield Check("golden study: slices", f"{figures.slices}, {figures.positive_slices} positive", "any", True)
    for what, found, least in (
        ("golden study: mean dice", figures.mean_dice, limits.mean_dice),
        ("golden study: worst dice", figures.min_dice, limits.min_dice),
        ("golden study: same slice verdicts", figures.verdict_agreement, limits.verdict_agreement),
    ):
        shown = "unknown" if found is None else f"{found:.4f}"
        yield Check(what, shown, f"at least {least:g}", found is not None and found >= least)
    yield Check("parity gate", complaints or "nothing to complain of", "nothing to complain of", not complaints)


def _latency_check(settings: TrialSettings, candidate: Candidate, transport: Transport, hu: NDArray[np.int16]) -> Check:
    from groundglass_client.trial import compare_latency
    from groundglass_ensemble.versions import Check

    latencies = compare_latency(transport, candidate.live, candidate.version, hu)
    found = f"{latencies.candidate_ms:.0f} ms against {latencies.live_ms:.0f}, {latencies.ratio:.2f} times"
    return Check(
        f"latency of {len(hu)} slices",
        found,
        f"{settings.latency_ratio:g} times",
        latencies.ratio <= settings.latency_ratio,
    )
