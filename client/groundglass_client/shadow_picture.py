"""Pictures of shadow traffic: a slice on which two versions disagree, with what each of them marks in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from groundglass.contract import IMAGE_SIDE, LUNG_WINDOW_CENTRE_HU, LUNG_WINDOW_WIDTH_HU
from groundglass.errors import SettingError
from groundglass.publish import published
from groundglass_client.overview import unpack_mask
from groundglass_client.shadow_worst import WorstSlice

LIVE_COLOUR: Final = "#2980b9"
CANDIDATE_COLOUR: Final = "#e67e22"
_OPACITY: Final = 0.6
_MARGIN_PIXELS: Final = 24
_LEAST_ZOOM_PIXELS: Final = 96
_OURS: Final = re.compile(r"disagreement_\d+_slice_\d+\.png")

Mask = NDArray[np.bool_]


def write_pictures(slices: Sequence[WorstSlice], folder: Path) -> list[Path]:
    """Write one PNG a slice, in their order, and remove those of an earlier shadow. Returns the paths.

    Raises SettingError when ``folder`` can't be written to.
    """
    paths = [
        folder / f"disagreement_{rank:02d}_slice_{slice_.difference.index:04d}.png"
        for rank, slice_ in enumerate(slices, 1)
    ]
    try:
        for path, slice_ in zip(paths, slices, strict=True):
            with published(path) as beside:
                _drawn(slice_).savefig(beside, dpi=100)
        for path in folder.glob("disagreement_*.png"):
            if _OURS.fullmatch(path.name) and path not in paths:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise SettingError(f"pictures can't be written to {folder}: {error.strerror or error}") from error
    return paths


def _drawn(slice_: WorstSlice) -> Figure:
    """On the left the whole slice with both outlines; on the right where they differ, with the difference filled."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    whole, near = figure.subplots(1, 2)
    live, candidate = (_unpacked(mask) for mask in (slice_.live_mask, slice_.candidate_mask))
    for axes in (whole, near):
        _draw_slice(axes, slice_.hu)
        _outline(axes, live, LIVE_COLOUR, 2.4)
        _outline(axes, candidate, CANDIDATE_COLOUR, 1.0)  # the thinner on the wider one: both show where they agree
    if slice_.live_mask is not None:
        _fill(near, live & ~candidate, LIVE_COLOUR)
        _fill(near, candidate & ~live, CANDIDATE_COLOUR)
    _zoom(near, live ^ candidate if (live ^ candidate).any() else candidate)
    names = f"live, version {slice_.live_version}", f"candidate, version {slice_.candidate_version}"
    patches = [
        Patch(color=colour, label=name) for colour, name in zip((LIVE_COLOUR, CANDIDATE_COLOUR), names, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=2)
    figure.suptitle(_title(slice_), fontsize=12)
    return figure


def _title(slice_: WorstSlice) -> str:
    found = slice_.difference
    live, candidate = (
        f"{pixels} lesion pixels, {'positive' if positive else 'negative'}"
        for pixels, positive in (
            (found.live_pixels, found.live_positive),
            (found.candidate_pixels, found.candidate_positive),
        )
    )
    dice = "" if found.dice is None else f" · dice {found.dice:.4f}"
    unasked = " at least (the live mask was not asked for)" if slice_.live_mask is None else ""
    return (
        f"slice {found.index}: {found.differing_pixels} pixels differ{unasked}{dice}\n"
        f"live version {slice_.live_version}: {live} · candidate version {slice_.candidate_version}: {candidate}\n"
        "Not for diagnosis."
    )


def _unpacked(packed: NDArray[np.uint8] | None) -> Mask:
    return np.zeros((IMAGE_SIDE, IMAGE_SIDE), np.bool_) if packed is None else unpack_mask(packed)


def _draw_slice(axes: Axes, hu: NDArray[np.int16]) -> None:
    low = LUNG_WINDOW_CENTRE_HU - LUNG_WINDOW_WIDTH_HU / 2
    extent = (0, IMAGE_SIDE, IMAGE_SIDE, 0)  # a slice of any size fills the square that the network sees
    axes.imshow(hu, cmap="gray", vmin=low, vmax=low + LUNG_WINDOW_WIDTH_HU, extent=extent)
    axes.set_axis_off()


def _outline(axes: Axes, mask: Mask, colour: str, width: float) -> None:
    if mask.any():
        centres = np.arange(-1, IMAGE_SIDE + 1) + 0.5
        axes.contour(centres, centres, np.pad(mask, 1), levels=[0.5], colors=colour, linewidths=width)


def _fill(axes: Axes, mask: Mask, colour: str) -> None:
    layer = np.zeros((IMAGE_SIDE, IMAGE_SIDE, 4), np.float32)
    layer[mask] = to_rgba(colour, _OPACITY)
    axes.imshow(layer, extent=(0, IMAGE_SIDE, IMAGE_SIDE, 0), interpolation="nearest")


def _zoom(axes: Axes, shown: Mask) -> None:
    """Show a square around what is to be seen; everything for an empty mask."""
    axes.set_xlim(0, IMAGE_SIDE)
    axes.set_ylim(IMAGE_SIDE, 0)
    if not shown.any():
        return
    spans = [np.flatnonzero(shown.any(axis=axis)) for axis in (0, 1)]
    widest = max(int(span[-1] - span[0]) + 1 + 2 * _MARGIN_PIXELS for span in spans)
    side = min(max(widest, _LEAST_ZOOM_PIXELS), IMAGE_SIDE)
    left, top = (int(np.clip((span[0] + span[-1] + 1 - side) // 2, 0, IMAGE_SIDE - side)) for span in spans)
    axes.set_xlim(left, left + side)
    axes.set_ylim(top + side, top)
