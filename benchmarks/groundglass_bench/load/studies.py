"""Synthetic studies that are ready to send, and the verdict that each must get."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import IMAGE_SIDE
from groundglass.errors import ServerError
from groundglass.report import ScanReport
from groundglass.study import Series, SliceSource, Study
from groundglass_client.phantom import PhantomSettings
from groundglass_client.phantom.chest import Chest

LESION_SLICES: Final = 20
"""Slices with ground glass in the middle of a study that is long enough: more than the 15 of a positive scan."""

KEPT: Final = 8
"""Slices of each sort that are made and sent again and again: 8 MiB in all."""

_PHANTOM: Final = PhantomSettings(slices=60, lesion=(20, 40))
_CLEAR: Final = (2, 8, 14, 18, 42, 48, 54, 58)
_MARKED: Final = (23, 25, 27, 29, 31, 33, 35, 37)

# Clear slices stay below 0 HU: a body a little too soft is as clear to the network, and a stand-in network that marks
# whatever has 0 HU or more gives the same verdict as the real one. That way any server's answers can be checked.
_CLEAR_BELOW_HU: Final = 0


@dataclass(frozen=True, slots=True)
class SyntheticStudy:
    """A study of a phantom's slices, which the slices from ``lesion_start`` to ``lesion_end`` (excluded) show sick."""

    study: Study
    lesion_start: int
    lesion_end: int

    @property
    def longest_run(self) -> int:
        """Slices of the lesion: the verdict's longest run."""
        return self.lesion_end - self.lesion_start


class Phantoms:
    """Makes studies of any size from a few decoded slices, which stay in memory: no decoding slows the sender."""

    def __init__(self, largest: int) -> None:
        """``largest``: slices of the largest study to make."""
        chest = Chest(_PHANTOM)
        self._clear = np.stack([chest.hu(index) for index in _CLEAR]).clip(max=_CLEAR_BELOW_HU - 1)
        self._marked = np.stack([chest.hu(index) for index in _MARKED])
        self._sources = tuple(
            SliceSource(index, Path(f"{index}"), f"{index}", 0, IMAGE_SIDE, IMAGE_SIDE, -float(index))
            for index in range(largest)
        )

    def study(self, slices: int) -> SyntheticStudy:
        """A study of so many slices; the lesion fills at most half of it."""
        lesion = min(LESION_SLICES, slices // 2)
        start = (slices - lesion) // 2
        series = Series("CT", None, 1, slices, IMAGE_SIDE, IMAGE_SIDE, None, (0.7, 0.7), 1.0, 0.0)
        return SyntheticStudy(Study(Path("study"), series, self._sources[:slices]), start, start + lesion)

    def hu(self, made: SyntheticStudy, source: SliceSource) -> NDArray[np.int16]:
        """One slice of ``made``: int16 (512, 512), HU."""
        sick = made.lesion_start <= source.index < made.lesion_end
        found: NDArray[np.int16] = (self._marked if sick else self._clear)[source.index % KEPT]
        return found


def check_verdict(made: SyntheticStudy, report: ScanReport, expected_run: int | None) -> None:
    """Raise ServerError when ``report`` is not what ``made`` must get.

    ``expected_run`` is for networks that see the phantom in another way: then only the longest run is compared.
    """
    run = made.longest_run if expected_run is None else expected_run
    if report.longest_run != run or report.scan_positive != (run >= report.positive_run):
        raise ServerError(
            f"wrong verdict: {report.verdict} with a longest run of {report.longest_run}, expected {run} "
            "(another network may need an expected run of its own)"
        )
    if expected_run is not None:
        return
    for result in report.slices:
        index = result.source.index
        if result.positive != (made.lesion_start <= index < made.lesion_end):
            raise ServerError(f"wrong verdict: slice {index} is {'positive' if result.positive else 'negative'}")
