"""How much a shadow may cost, and what it calls a disagreement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from groundglass.errors import SettingError

_LEAST: Final = {"window": 1, "mask_tolerance": 0, "pictures": 0, "scans": 1, "timeout_s": 0, "close_s": 0}


@dataclass(frozen=True, slots=True)
class ShadowSettings:
    """How much a shadow may cost, and what it calls a disagreement.

    window: copies that exist at once, each with the pixels of its request (4 to 8 MiB).
    patient: wait for a place in the window instead of leaving a request out: everything is compared, at the
        candidate's pace. For a replay, where nobody waits for the live answer.
    mask_tolerance: pixels, of 512x512, that the masks of a slice may differ by and still agree.
    pictures: disagreeing slices that are kept, the worst ones.
    scans: scans whose verdicts are awaited at once; the oldest makes room.
    timeout_s: longest wait for one answer of the candidate, and of a patient request for its place.
    close_s: how long the end waits for the copies that are still on their way.
    """

    window: int = 2
    patient: bool = False
    mask_tolerance: int = 0
    pictures: int = 8
    scans: int = 256
    timeout_s: float = 300.0
    close_s: float = 30.0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:  # a NaN is not
                raise SettingError(f"shadow setting {name} is {getattr(self, name)}, expected {least} or more")


DEFAULT_SHADOW: Final = ShadowSettings()
