"""What the name of a file tells of a slice: its place, its scan, its publication, its part of a cross-validation."""

from __future__ import annotations

import bisect
import re
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final

PICTURES: Final = frozenset({".png", ".jpg", ".jpeg"})
"""How the names of 8-bit images end, in lower case."""

_PUBLICATION_ENDS: Final = re.compile(r"-p\d+|%")


def running_number(path: Path) -> int:
    """The number that orders the slices of a folder: all digits of the file's name, read as one; 0 without any."""
    return int("".join(re.findall(r"\d+", path.stem)) or 0)


def scan_of(path: Path, scan_starts: Sequence[int]) -> int:
    """The scan of a slice, by position in ``scan_starts``: the numbers, rising, at which a new scan begins."""
    return max(bisect.bisect_right(scan_starts, running_number(path)) - 1, 0)


def publication(file: str) -> str:
    """Which publication an image is from: its file name before ``-p<number>`` or ``%``."""
    return _PUBLICATION_ENDS.split(PurePosixPath(file).stem, maxsplit=1)[0]


def fold_of(name: str, folds: int) -> int:
    """The part, 0 to ``folds`` - 1, of a publication: by its name alone, so that no other file moves it."""
    return zlib.crc32(name.encode()) % folds
