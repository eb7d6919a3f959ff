"""Memory of processes, as the system counts it.

Of several processes: proportional bytes (PSS), where a page that n processes share counts as 1/n for each. Triton and
its Python stages share the memory that tensors travel in, which resident bytes (RSS) would count several times.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

MB: Final = 1e6
_POLL_S: Final = 0.25
_KB: Final = 1024


def group_bytes(leader: int) -> int:
    """Proportional bytes of the process group that ``leader`` leads: of an embedded server with its stages."""
    return _proportional(process for process in psutil.process_iter() if _group(process) == leader)


def children_bytes(without_group: int) -> int:
    """Proportional bytes of all processes that this one started, those of one group left out."""
    children = psutil.Process().children(recursive=True)
    return _proportional(child for child in children if _group(child) != without_group)


def own_bytes() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def own_peak_bytes() -> int:
    """The most that this program ever had resident.

    Not ``getrusage``: what it calls the maximum of a new program includes the memory of the process that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * _KB
    raise OSError("/proc/self/status has no VmHWM")


@contextmanager
def watched(readings: Mapping[str, Callable[[], int]]) -> Iterator[dict[str, int]]:
    """The largest value of each reading while the block runs, complete once it ends."""
    peaks = {name: read() for name, read in readings.items()}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_POLL_S):
            for name, read in readings.items():
                peaks[name] = max(peaks[name], read())

    watcher = threading.Thread(target=watch, name="memory")
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


def _group(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return -1


def _proportional(processes: Iterable[psutil.Process]) -> int:
    total = 0
    for process in processes:
        with suppress(psutil.Error):  # it has ended meanwhile
            total += process.memory_full_info().pss
    return total
