"""How a study travels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from groundglass.errors import SettingError
from groundglass_client.canary import Canary

MIB: Final = 1 << 20
SHARED_CHUNK_BYTES: Final = 8 * MIB
SENT_CHUNK_BYTES: Final = 4 * MIB
"""Pixels of one request that the server reads from shared memory, and of one that travels as bytes. On two cores and a
near-free network (November 2026) 8 MiB were 0 to 24 % faster than 4 in shared memory and 16 no faster than 8; over gRPC
4 were 6 to 19 % faster than 8."""


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a study travels.

    chunk_bytes: pixels of one request, in bytes; None for 8 MiB in shared memory and 4 MiB over gRPC.
    window: requests in flight. Four keep the server busy while others are decoded and read.
    ahead: decoded chunks that wait for their turn, so that a free place in the window is filled at once.
    decode_workers: threads that decode; None for one a core. The decoders let go of Python's lock.
    request_timeout_s: longest wait for one answer; a CPU needs seconds for a chunk, and a window of them queues.
    connect_timeout_s: how long a server may take to be reachable at first.
    recovery_s: how long a server may stay unreachable, or overloaded, in the middle of a study.
    deadline_s: the study's own limit, from the first request to the verdict, whatever is computed again; None for none.
    masks: ask for the lesion masks (32 KiB a slice).
    skip_bad: leave out slices that can't be decoded and say so in the report, instead of refusing the study.
    version: the model version that answers, asked for by name; None for the one that is live.
    canary: a candidate version that answers a share of the studies; None for none.
    """

    chunk_bytes: int | None = None
    window: int = 4
    ahead: int = 2
    decode_workers: int | None = None
    request_timeout_s: float = 300.0
    connect_timeout_s: float = 10.0
    recovery_s: float = 120.0
    deadline_s: float | None = None
    masks: bool = True
    skip_bad: bool = False
    version: str | None = None
    canary: Canary | None = None

    def __post_init__(self) -> None:
        if self.version is not None and self.canary is not None:
            raise SettingError(
                f"model version {self.version} and a canary of version {self.canary.version} are both asked for: a "
                "study goes to one version, so give one of the two"
            )

    def chunk_bytes_of(self, *, shared: bool) -> int:
        """``chunk_bytes``, or what measured best for memory that is ``shared`` with the server or not."""
        return self.chunk_bytes or (SHARED_CHUNK_BYTES if shared else SENT_CHUNK_BYTES)

    @property
    def decode_threads(self) -> int:
        """``decode_workers``, or the cores that this process may run on."""
        return self.decode_workers or len(os.sched_getaffinity(0))


DEFAULT_SETTINGS: Final = SessionSettings()
