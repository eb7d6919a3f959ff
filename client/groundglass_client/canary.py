"""A canary: a candidate version of the network answers a share of the studies, whole studies only."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from groundglass.errors import SettingError
from groundglass.study import Study

_WRITTEN: Final = re.compile(r"([1-9][0-9]*):([0-9]*\.?[0-9]+)")
_DRAW_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Canary:
    """``version`` answers ``share`` of the studies, 0 to 1; the live version answers the others.

    A canary never fails a study: what the candidate does not answer to its end is computed on the live version.
    """

    version: str
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:  # a NaN is neither
            raise SettingError(f"canary of version {self.version}: share is {self.share:g}, expected 0 to 1")

    @classmethod
    def parse(cls, text: str) -> Canary:
        """Read ``VERSION:SHARE``, such as ``2:0.1`` for a tenth of the studies. Raises SettingError."""
        written = _WRITTEN.fullmatch(text)
        if written is None:
            raise SettingError(
                f"canary {text!r}: expected VERSION:SHARE, a version's number and a share from 0 to 1, such as 2:0.1"
            )
        return cls(written[1], float(written[2]))

    def takes(self, study: Study) -> bool:
        """Whether the candidate answers this study: the same for the same series, whoever asks and how often."""
        digest = hashlib.sha256(_identity(study).encode(errors="surrogateescape")).digest()
        return int.from_bytes(digest[:_DRAW_BYTES], "big") < self.share * 256**_DRAW_BYTES


def _identity(study: Study) -> str:
    """What a study sent twice has in common: its series; for pictures, which have none, where they lie."""
    return study.series.series_instance_uid or f"{study.root} of {len(study.slices)} slices"
