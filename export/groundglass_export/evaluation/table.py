"""Figures as columns of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from groundglass.contract import POSITIVE_RUN
from groundglass_export.evaluation.intervals import Estimate, Interval, Share
from groundglass_export.evaluation.metrics import DiceFigures, ScanFigures, SliceFigures

TableRow = tuple[str, str, SliceFigures, DiceFigures | None, ScanFigures]
"""Name, what training saw of it, and the figures."""

_NONE: Final = "-"


def tables(rows: Sequence[TableRow]) -> Iterator[str]:
    """The lines of three tables, an empty line after each; a table without a single entry is left out."""
    yield from _table(
        ("slices", "seen", "slices", "groups", "lesion", "none", "sensitivity", "specificity"),
        [(name, seen, *_slices(slices)) for name, seen, slices, _, _ in rows],
    )
    yield from _table(
        ("masks", "seen", "slices", "dice mean", "dice median", "dice pooled", "resampled"),
        [(name, seen, *_dice(dice)) for name, seen, _, dice, _ in rows if dice is not None],
    )
    yield from _table(
        (f"scans ({POSITIVE_RUN} in a row)", "seen", "scans", "lesion", "none", "sensitivity", "specificity", "F1"),
        [(name, seen, *_scans(scans)) for name, seen, _, _, scans in rows if scans.scans],
    )


def _slices(figures: SliceFigures) -> tuple[str, ...]:
    hit, spared = figures.sensitivity, figures.specificity
    return str(figures.slices), str(figures.groups), str(hit.total), str(spared.total), _share(hit), _share(spared)


def _dice(figures: DiceFigures) -> tuple[str, ...]:
    values = (_estimate(value) for value in (figures.mean, figures.median, figures.pooled))
    return str(figures.slices), *values, f"{figures.units} {figures.resampled}"


def _scans(figures: ScanFigures) -> tuple[str, ...]:
    hit, spared = figures.sensitivity, figures.specificity
    counts = (str(count) for count in (figures.scans, hit.total, spared.total))
    return *counts, _share(hit), _share(spared), _estimate(figures.f1)


def _share(share: Share) -> str:
    return _NONE if share.value is None or share.interval is None else _figure(share.value, share.interval)


def _estimate(estimate: Estimate | None) -> str:
    return _NONE if estimate is None else _figure(estimate.value, estimate.interval)


def _figure(value: float, interval: Interval) -> str:
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    if not rows:
        return
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for name, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([name.ljust(widths[0]), *padded])
    yield ""
