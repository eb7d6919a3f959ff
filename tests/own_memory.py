"""Shared memory as one test process sees it: regions of other processes, other workers included, are not its own."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

from groundglass_ensemble.keeper import SHARED_MEMORY

_BETWEEN_CREATED_AND_MAPPED_S = 0.1


def regions(prefix: str) -> set[str]:
    """Names of the regions that start with ``prefix``, those left out that a process maps which is none of ours.

    Looked at twice: a process that was just creating or removing one of its own has done so by then.
    """
    if not (seen := _unclaimed(prefix)):
        return seen
    time.sleep(_BETWEEN_CREATED_AND_MAPPED_S)
    return seen & _unclaimed(prefix)


def _unclaimed(prefix: str) -> set[str]:
    names = {region.name for region in SHARED_MEMORY.glob(f"{prefix}*")}
    if not names:
        return names
    ours = {child.pid for child in psutil.Process().children(recursive=True)} | {os.getpid()}
    maps = []
    for process in psutil.process_iter():
        if process.pid not in ours:
            with suppress(OSError):
                maps.append(Path(f"/proc/{process.pid}/maps").read_text())
    return {name for name in names if not any(name in text for text in maps)}
