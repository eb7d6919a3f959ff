"""The picture of the worst slice: the reference's mask, the candidate's, and what is in one of them only."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from groundglass.contract import IMAGE_SIDE, LUNG_WINDOW_CENTRE_HU, LUNG_WINDOW_WIDTH_HU
from groundglass.errors import ModelError
from groundglass.publish import published
from groundglass_export.answers import Answers, Given
from groundglass_export.gate.comparison import Comparison, ask
from groundglass_export.gate.figures import compare_slice
from groundglass_export.gate.report import GateReport

REFERENCE_COLOUR: Final = (0.16, 0.50, 0.73)
CANDIDATE_COLOUR: Final = (0.90, 0.49, 0.13)
COMMON_COLOUR: Final = (0.56, 0.27, 0.68)
_OPACITY: Final = 0.55
_COMMON_OPACITY: Final = 0.3  # what differs is to stand out
_MARGIN_PIXELS: Final = 24
_LEAST_ZOOM_PIXELS: Final = 96

Grey = NDArray[np.float32]
Mask = NDArray[np.bool_]


def write_picture(report: GateReport, comparison: Comparison, path: Path) -> Path:
    """Write ``report.worst`` as PNG: above the whole slice, below the part of it where masks are. Returns ``path``.

    Both engines answer that slice once more, alone. Raises what they and the scan raise, and ModelError when the file
    can't be written.
    """
    given = comparison.image(report.worst)
    answers = [ask(engine, [report.worst], given[None]) for engine in (comparison.reference, comparison.candidate)]
    figure = _drawn(report, _grey(given), answers[0], answers[1])
    try:
        with published(path) as beside:
            figure.savefig(beside, dpi=100, format="png")
    except OSError as error:
        raise ModelError(f"the picture {path} was not written: {error.strerror or error}") from error
    return path


def _drawn(report: GateReport, image: Grey, expected: Answers, found: Answers) -> Figure:
    figure = Figure(figsize=(12, 8.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 3)
    reference, candidate = expected.mask[0], found.mask[0]
    neither = np.zeros_like(reference)
    panels = (
        (f"reference: {report.reference.precision}, {reference.sum()} pixels", reference, neither),
        (f"candidate: {report.candidate.precision}, {candidate.sum()} pixels", neither, candidate),
        (f"difference: {(reference ^ candidate).sum()} pixels", reference, candidate),
    )
    part = _zoom(reference ^ candidate if (reference ^ candidate).any() else reference | candidate)
    for column, (title, blue, orange) in enumerate(panels):
        for axes, region in zip(grid[:, column], (None, part), strict=True):
            _draw(axes, _painted(image, blue, orange), region)
        grid[0, column].set_title(title, fontsize=11)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3)
    figure.suptitle(_title(report, expected, found), fontsize=12)
    return figure


def _grey(given: Given) -> Grey:
    """A slice as the lung window shows it, float32 (512, 512): an image is that already, Hounsfield units are not."""
    if given.dtype == np.float32:
        image: Grey = given[0]
        return image
    floor_hu = LUNG_WINDOW_CENTRE_HU - LUNG_WINDOW_WIDTH_HU / 2
    rows, columns = ((np.arange(IMAGE_SIDE) + 0.5) * side // IMAGE_SIDE for side in given.shape)  # nearest is enough
    shown = given[np.ix_(rows.astype(np.intp), columns.astype(np.intp))]
    windowed: Grey = (shown.astype(np.float32) - np.float32(floor_hu)) / np.float32(LUNG_WINDOW_WIDTH_HU)
    return windowed


def _title(report: GateReport, expected: Answers, found: Answers) -> str:
    parity = compare_slice(report.worst, expected, found)
    peak = "" if parity.probability_max is None else f" · probability off by up to {parity.probability_max:.3g}"
    words = [
        "positive" if positive else "negative" for positive in (parity.reference_positive, parity.candidate_positive)
    ]
    lines = [
        f"{'equivalent' if report.passed else 'NOT equivalent'}: {report.candidate} against {report.reference}",
        f"{parity.scan} slice {parity.index} · dice {parity.dice:.4f}{peak} · {words[0]} under the reference, "
        f"{words[1]} under the candidate",
        *(complaint.text for complaint in report.complaints[:1]),
    ]
    return "\n".join(lines)


def _painted(image: Grey, reference: Mask, candidate: Mask) -> NDArray[np.float32]:
    """The slice in grey with masks in colour over it: float32 (512, 512, 3) in 0..1."""
    colours = np.repeat(np.clip(image, 0.0, 1.0)[..., None], 3, axis=2)
    for where, colour, opacity in (
        (reference & ~candidate, REFERENCE_COLOUR, _OPACITY),
        (candidate & ~reference, CANDIDATE_COLOUR, _OPACITY),
        (reference & candidate, COMMON_COLOUR, _COMMON_OPACITY),
    ):
        colours[where] = (1 - opacity) * colours[where] + opacity * np.array(colour, dtype=np.float32)
    return colours


def _zoom(shown: Mask) -> tuple[slice, slice]:
    """Rows and columns of a square around what is to be seen; everything for an empty mask."""
    if not shown.any():
        return slice(0, shown.shape[0]), slice(0, shown.shape[1])
    spans = [np.flatnonzero(shown.any(axis=axis)) for axis in (1, 0)]
    widest = max(int(span[-1] - span[0]) + 1 + 2 * _MARGIN_PIXELS for span in spans)
    side = min(max(widest, _LEAST_ZOOM_PIXELS), *shown.shape)
    starts = [
        int(np.clip((span[0] + span[-1] + 1 - side) // 2, 0, length - side))
        for span, length in zip(spans, shown.shape, strict=True)
    ]
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def _draw(axes: Axes, colours: NDArray[np.float32], region: tuple[slice, slice] | None) -> None:
    axes.imshow(colours if region is None else colours[region], interpolation="nearest")
    axes.set_axis_off()


def _legend() -> list[Patch]:
    names = ("reference", "candidate", "both")
    colours = (REFERENCE_COLOUR, CANDIDATE_COLOUR, COMMON_COLOUR)
    return [Patch(color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
