"""Which publication a single image is from, and which part of a cross-validation the publication belongs to."""

from __future__ import annotations

import re
import zlib
from pathlib import PurePosixPath
from typing import Final

_ENDS: Final = re.compile(r"-p\d+|%")


def publication(file: str) -> str:
    """Which publication an image is from: its file name before ``-p<number>`` or ``%``."""
    return _ENDS.split(PurePosixPath(file).stem, maxsplit=1)[0]


def fold_of(name: str, folds: int) -> int:
    """The part, 0 to ``folds`` - 1, of a publication: by its name alone, so that no other file moves it."""
    return zlib.crc32(name.encode()) % folds
