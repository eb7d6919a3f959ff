"""What the gate found: figures, complaints, and the forms in which a person, a manifest and a program read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from groundglass.errors import ParityError
from groundglass.finding import ScanFinding
from groundglass_export.gate.coherence import Complaint
from groundglass_export.gate.figures import Figures, SliceKey, SliceParity
from groundglass_export.gate.limits import GateLimits

_COMPLAINTS_SHOWN: Final = 3
_DIGITS: Final = 6
_DIGEST_SHOWN: Final = 12


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """Which file ran, by name, precision and SHA-256."""

    name: str
    precision: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.precision} {self.name} ({self.sha256[:_DIGEST_SHOWN]})"


@dataclass(frozen=True, slots=True)
class ScanParity:
    """One scan: its figures, and its verdict under both."""

    name: str
    figures: Figures
    reference: ScanFinding
    candidate: ScanFinding

    @property
    def same_verdict(self) -> bool:
        """Whether the scan is positive under both, or under neither."""
        return self.reference.positive == self.candidate.positive


@dataclass(frozen=True, slots=True)
class GateReport:
    """The whole comparison. ``slices_sha256`` is the digest of the Hounsfield units that it was made on.

    ``notes`` say what the slices at hand could not prove; they fail nothing.
    """

    reference: EngineIdentity
    candidate: EngineIdentity
    limits: GateLimits
    slices_sha256: str
    overall: Figures
    scans: tuple[ScanParity, ...]
    slices: tuple[SliceParity, ...]
    complaints: tuple[Complaint, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the candidate may take the reference's place."""
        return not self.complaints

    @property
    def worst(self) -> SliceKey:
        """The slice to look at: of the first complaint that names one, else the one whose masks differ most.

        Among slices without a complaint, those that the reference calls positive come first, by dice.
        """
        named = (complaint.worst for complaint in self.complaints if complaint.worst is not None)
        worst = min(self.slices, key=lambda item: (not item.reference_positive, item.dice, -item.differing_pixels))
        return next(named, worst.key)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: no name of a scan or of a file, and figures rounded, so that they can be repeated."""
        return {
            "reference_sha256": self.reference.sha256,
            "slices_sha256": self.slices_sha256,
            "scans": len(self.scans),
            "scan_verdicts_differing": sum(not scan.same_verdict for scan in self.scans),
            **_rounded(asdict(self.overall)),
            "limits": asdict(self.limits),
            "notes": list(self.notes),
            "passed": self.passed,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "passed": self.passed,
            "complaints": [{**asdict(complaint), "text": complaint.text} for complaint in self.complaints],
            "worst": {"scan": self.worst[0], "index": self.worst[1]},
            "notes": list(self.notes),
            "reference": asdict(self.reference),
            "candidate": asdict(self.candidate),
            "limits": asdict(self.limits),
            "slices_sha256": self.slices_sha256,
            "overall": _rounded(asdict(self.overall)),
            "scans": [_scan(scan) for scan in self.scans],
            "slices": [_rounded(asdict(item)) for item in self.slices],
        }

    def as_text(self) -> str:
        """A table for a terminal, and the verdict as its last line."""
        rows = [(scan.name, scan.figures, scan) for scan in self.scans]
        lines = [
            f"candidate {self.candidate}",
            f"reference {self.reference}",
            f"{self.overall.slices} slices, SHA-256 {self.slices_sha256[:_DIGEST_SHOWN]}",
            "",
            *_table([_HEADER, *(_cells(*row) for row in rows), _cells("all", self.overall, None)]),
            "",
            *(f"note: {note}" for note in self.notes),
            *(f"not equal: {complaint.text}" for complaint in self.complaints),
            f"slices with another verdict: below {self.overall.verdict_risk:.2%} of such slices (95 % confidence)",
            "equivalent" if self.passed else f"NOT equivalent; worst slice: {self.worst[0]} {self.worst[1]}",
        ]
        return "\n".join(lines)


def require(report: GateReport, picture: Path | None = None) -> None:
    """Raise ParityError, in one line with the worst slice and its ``picture``, for a report that did not pass."""
    if report.passed:
        return
    shown = "; ".join(complaint.text for complaint in report.complaints[:_COMPLAINTS_SHOWN])
    rest = len(report.complaints) - _COMPLAINTS_SHOWN
    more = f"; and {rest} more" if rest > 0 else ""
    scan, index = report.worst
    seen = f", see {picture}" if picture is not None else ""
    raise ParityError(
        f"{report.candidate} is not equivalent to {report.reference} over {report.overall.slices} slices: "
        f"{shown}{more}. Worst slice: {scan} slice {index}{seen}"
    )


_HEADER: Final = (
    "scan", "slices", "positive", "dice mean", "min", "pixels off max", "mean", "probability off max", "mean",
    "in lesions", "verdicts off", "longest run", "scan verdict",
)  # fmt: skip


def _cells(name: str, figures: Figures, scan: ScanParity | None) -> tuple[str, ...]:
    pair = ("", "")
    if scan is not None:
        words = ["positive" if finding.positive else "negative" for finding in (scan.reference, scan.candidate)]
        pair = (_pair(scan.reference.longest_run, scan.candidate.longest_run), _pair(*words))
    return (
        name, str(figures.slices), str(figures.positive_slices), _number(figures.mean_dice, ".4f"),
        _number(figures.min_dice, ".4f"), str(figures.pixel_difference_max),
        _number(figures.pixel_difference_mean, ".1f"), _number(figures.probability_max, ".3g"),
        _number(figures.probability_mean, ".2g"), _number(figures.band_mean, ".2g"), str(figures.verdicts_differing),
        *pair,
    )  # fmt: skip


def _pair(reference: object, candidate: object) -> str:
    return str(reference) if reference == candidate else f"{reference} -> {candidate}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *rest = (cell.ljust(width) if not column else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        yield "  ".join((first, *rest)).rstrip()


def _scan(scan: ScanParity) -> dict[str, Any]:
    findings = {"reference": scan.reference, "candidate": scan.candidate}
    return {
        "name": scan.name,
        "same_verdict": scan.same_verdict,
        **{
            who: {"longest_run": finding.longest_run, "positive": finding.positive} for who, finding in findings.items()
        },
        "figures": _rounded(asdict(scan.figures)),
    }


def _rounded(content: dict[str, Any]) -> dict[str, Any]:
    """Six digits: what is beyond them is the noise of summation."""
    return {key: float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value for key, value in content.items()}
