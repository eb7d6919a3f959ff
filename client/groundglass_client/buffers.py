"""Memory for chunks: of this process alone, or system shared memory that a server on the same host reads itself.

A buffer in shared memory is one file under ``/dev/shm``, locked by its owner for as long as the owner lives. It is
used again once its request was answered. A request that was *not* answered may still be read or written by the server,
so its buffer never is: it is condemned, and a new one takes its place. However a process ends, what it leaves is
removed: by itself in order, or by the next client, which finds a file whose lock is free.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import IMAGE_SIDE, MASK_ROW_BYTES

log = logging.getLogger(__name__)

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory, not a temporary file
PREFIX: Final = "groundglass_client_"
MASK_BYTES: Final = IMAGE_SIDE * MASK_ROW_BYTES
"""Bytes of one slice's bit-packed mask."""

_ABANDONED_S: Final = 60.0
"""Age from which an unlocked file is litter: between its creation and its lock lie microseconds."""
_MOST_CONDEMNED: Final = 32
"""Condemned buffers that a server has not let go of: beyond it, chunks travel as bytes until it does."""


@dataclass(slots=True, eq=False)
class Region:
    """One file of shared memory. ``name`` is also its name at a server."""

    name: str
    size: int
    memory: NDArray[np.uint8]
    descriptor: int
    holders: dict[int, Callable[[str], bool]] = field(default_factory=dict)
    """How to take it back from every server that knows it; True once that server has let go of it."""

    @property
    def key(self) -> str:
        """The name under which POSIX ``shm_open`` finds it."""
        return f"/{self.name}"

    def unlink(self) -> None:
        """Remove the file. The memory lives on for as long as somebody maps it."""
        with suppress(FileNotFoundError):
            (SHARED_MEMORY / self.name).unlink()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def released(self) -> bool:
        """Ask every server that knows it to let go; whether all have."""
        self.holders = {number: release for number, release in self.holders.items() if not release(self.name)}
        return not self.holders


@dataclass(slots=True, eq=False)
class Buffer:
    """Memory of one chunk: its pixels first, and behind them room for the masks of its answer."""

    memory: NDArray[np.uint8]
    region: Region | None = None

    def hu(self, slices: int, rows: int, columns: int) -> NDArray[np.int16]:
        """Its start as int16 (slices, rows, columns)."""
        size = slices * rows * columns * np.dtype(np.int16).itemsize
        return self.memory[:size].view(np.int16).reshape(slices, rows, columns)

    def mask_offset(self, slices: int) -> int:
        """Where the masks of ``slices`` slices start: they end with the buffer."""
        return len(self.memory) - slices * MASK_BYTES

    def masks(self, slices: int) -> NDArray[np.uint8]:
        """Its end as uint8 (slices, 512, 64), bit-packed."""
        return self.memory[self.mask_offset(slices) :].reshape(slices, IMAGE_SIDE, MASK_ROW_BYTES)


class Buffers:
    """Buffers that are used again and again. Threads may share it.

    With ``shared`` they lie in shared memory while the system has room for it, and in memory of this process else.
    """

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._lock = threading.Lock()
        self._free: list[Buffer] = []
        self._regions: dict[str, Region] = {}
        self._condemned: list[Region] = []
        if shared:
            remove_abandoned()

    @property
    def shared(self) -> bool:
        """Whether they lie in shared memory."""
        return self._shared

    def take(self, size: int) -> Buffer:
        """A buffer of ``size`` bytes. It never waits: whoever takes bounds how many it holds."""
        with self._lock:
            for position, buffer in enumerate(self._free):
                if len(buffer.memory) == size:
                    return self._free.pop(position)
            stale, self._free = self._free, []  # of another study's chunk size: what is unused is not kept
        for buffer in stale:
            self._condemn(buffer)
        return self._made(size)

    def give_back(self, buffer: Buffer, *, answered: bool) -> None:
        """Let others have it. ``answered``: no server will touch it any more."""
        if answered:
            with self._lock:
                self._free.append(buffer)
        else:
            self._condemn(buffer)

    def close(self, patience_s: float = 10.0) -> None:
        """Have the servers let go of everything, for at most ``patience_s``, and remove every file."""
        with self._lock:
            self._shared = False  # whoever still takes gets memory of this process
            left = [*self._regions.values(), *self._condemned]
            self._free, self._regions, self._condemned = [], {}, []
        for region in left:
            region.unlink()
        ends = time.monotonic() + patience_s
        # A server refuses to let go of memory that a request in progress uses (triton-inference-server/server#7567).
        while (left := [region for region in left if not region.released()]) and time.monotonic() < ends:
            time.sleep(0.05)
        if left:
            log.warning("%d shared memory regions are still registered: their requests have not ended", len(left))

    def _made(self, size: int) -> Buffer:
        if self._shared and self._reaped() < _MOST_CONDEMNED:
            try:
                region = _create(size)
            except OSError as error:
                self._shared = False
                log.warning(
                    "shared memory is not used: %d bytes could not be had in %s (%s); a container needs a larger "
                    "shm_size",
                    *(size, SHARED_MEMORY, error.strerror),
                )
            else:
                with self._lock:
                    self._regions[region.name] = region
                return Buffer(region.memory, region)
        return Buffer(np.empty(size, dtype=np.uint8))

    def _condemn(self, buffer: Buffer) -> None:
        if (region := buffer.region) is None:
            return
        region.unlink()
        with self._lock:
            self._regions.pop(region.name, None)
            self._condemned.append(region)

    def _reaped(self) -> int:
        """Condemned regions that servers still hold, after asking them again."""
        with self._lock:
            asked, self._condemned = self._condemned, []
        held = [region for region in asked if not region.released()]
        with self._lock:
            self._condemned += held
            return len(self._condemned)


def remove_abandoned() -> None:
    """Remove the files of clients that were killed: their locks went with them."""
    for path in SHARED_MEMORY.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or gone meanwhile
            if time.time() - path.stat().st_mtime < _ABANDONED_S:
                continue
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def _create(size: int) -> Region:
    name = f"{PREFIX}{secrets.token_hex(8)}"
    path = SHARED_MEMORY / name
    # Readable by this user alone: the pixels are a patient's.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Allocated now: where /dev/shm is full, a later write would end the process with SIGBUS.
        os.posix_fallocate(descriptor, 0, size)
        memory = np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)
    except BaseException:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return Region(name, size, memory, descriptor)
