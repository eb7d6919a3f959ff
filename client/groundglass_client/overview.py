"""The overview picture: lesion area along the scan with its longest run, and the slices of largest lesion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from groundglass.contract import IMAGE_SIDE, LUNG_WINDOW_CENTRE_HU, LUNG_WINDOW_WIDTH_HU
from groundglass.publish import published
from groundglass.report import ScanReport, SliceResult
from groundglass_client.chunk import DecodeHu

SHOWN_SLICES: Final = 6
POSITIVE_COLOUR: Final = "#c0392b"
NEGATIVE_COLOUR: Final = "#7f8c8d"
RUN_COLOUR: Final = "#f5b7b1"


def write_overview(report: ScanReport, masks: NDArray[np.uint8] | None, decode_hu: DecodeHu, path: Path) -> None:
    """Write the picture as PNG. ``masks`` uint8 (n, 512, 64) as in ScanAnalysis; without them no outline is drawn.

    The shown slices are decoded again, so that a study's pixels need not be kept. Raises what ``decode_hu`` raises.
    """
    figure = Figure(figsize=(12, 10), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 3, height_ratios=(1.1, 1, 1))
    _draw_areas(figure.add_subplot(grid[0, :]), report)
    for place, result in enumerate(_shown(report.slices)):
        axes = figure.add_subplot(grid[1 + place // 3, place % 3])
        mask = None if masks is None else unpack_mask(masks[result.source.index])
        _draw_slice(axes, result, decode_hu(result.source), mask)
    figure.suptitle(_title(report), fontsize=14)
    with published(path) as beside:
        figure.savefig(beside, dpi=100)


def unpack_mask(packed: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """A bit-packed mask, uint8 (512, 64), as bool (512, 512)."""
    return np.unpackbits(packed, axis=-1).astype(np.bool_)


def lesion_area_cm2(report: ScanReport, lesion_pixels: int) -> float | None:
    """Area of ``lesion_pixels`` mask pixels in the patient, square centimetres; None for images without pixel
    spacing.
    """
    spacing_mm = report.study.series.pixel_spacing_mm
    if spacing_mm is None:
        return None
    height_mm = report.study.series.rows * spacing_mm[0]
    width_mm = report.study.series.columns * spacing_mm[1]
    return lesion_pixels * height_mm * width_mm / IMAGE_SIDE**2 / 100


def _title(report: ScanReport) -> str:
    return (
        f"Scan {report.verdict}: longest run {report.longest_run} of {report.slice_count} slices "
        f"(positive from {report.positive_run}) · model version {report.model_version} · not for diagnosis"
    )


def _shown(slices: Sequence[SliceResult]) -> list[SliceResult]:
    largest = sorted(slices, key=lambda result: (-result.lesion_pixels, result.source.index))[:SHOWN_SLICES]
    return sorted(largest, key=lambda result: result.source.index)


def _draw_areas(axes: Axes, report: ScanReport) -> None:
    areas = [lesion_area_cm2(report, result.lesion_pixels) for result in report.slices]
    heights = [
        result.lesion_pixels if area is None else area for area, result in zip(areas, report.slices, strict=True)
    ]
    colours = [POSITIVE_COLOUR if result.positive else NEGATIVE_COLOUR for result in report.slices]
    if report.run_start is not None:
        run_end = report.run_start + report.longest_run
        label = f"longest run: {report.longest_run} slices, {report.run_start} to {run_end - 1}"
        axes.axvspan(report.run_start - 0.5, run_end - 0.5, color=RUN_COLOUR, alpha=0.6, label=label)
        axes.legend(loc="upper right")
    axes.bar(range(len(heights)), heights, width=1.0, color=colours)
    axes.set_xlim(-0.5, len(heights) - 0.5)
    axes.set_xlabel("slice, head to feet (positive ones in red)")
    axes.set_ylabel("lesion area, pixels of the mask" if areas[0] is None else "lesion area, cm²")


def _draw_slice(axes: Axes, result: SliceResult, hu: NDArray[np.int16], mask: NDArray[np.bool_] | None) -> None:
    low = LUNG_WINDOW_CENTRE_HU - LUNG_WINDOW_WIDTH_HU / 2
    extent = (0, IMAGE_SIDE, IMAGE_SIDE, 0)  # a slice of any size fills the square that the network sees
    axes.imshow(hu, cmap="gray", vmin=low, vmax=low + LUNG_WINDOW_WIDTH_HU, extent=extent)
    if mask is not None and mask.any():
        centres = np.arange(IMAGE_SIDE) + 0.5
        axes.contour(centres, centres, mask, levels=[0.5], colors=POSITIVE_COLOUR, linewidths=1.0)
    axes.set_title(f"slice {result.source.index}: {result.lesion_pixels} pixels", fontsize=10)
    axes.set_axis_off()
