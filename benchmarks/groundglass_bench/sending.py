"""One study through the client, timed: what every scenario repeats."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from groundglass.contract import IMAGE_SIDE
from groundglass.errors import ServerError
from groundglass.study import Study
from groundglass_client.chunk import HU_BYTES, DecodeHu
from groundglass_client.session import ScanAnalysis, SessionSettings, analyse
from groundglass_client.settings import SHARED_CHUNK_BYTES
from groundglass_client.transport import Transport

CHUNK_SLICES: Final = SHARED_CHUNK_BYTES // (HU_BYTES * IMAGE_SIDE**2)
"""Of one request of our client in shared memory, 512x512 each: peers that send chunks send as many."""

WARM_UP_SLICES: Final = 16
"""Of a study sent before those that are timed, where a whole one would take minutes."""

REQUEST_TIMEOUT_S: Final = 900.0
"""A window of chunks queues before a network on a CPU: minutes, on a slow one."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A study's wall time, and what came back."""

    seconds: float
    analysis: ScanAnalysis


def send_study(study: Study, transport: Transport, decode_hu: DecodeHu, *, masks: bool = False) -> Sent:
    """Analyse ``study``. Raises ServerError when the verdict does not cover all of its slices."""
    settings = SessionSettings(masks=masks, request_timeout_s=REQUEST_TIMEOUT_S)
    started = time.perf_counter()
    analysis = analyse(study, transport, decode_hu, settings)
    seconds = time.perf_counter() - started
    if analysis.report.slice_count != len(study.slices):
        raise ServerError(f"{analysis.report.slice_count} of {len(study.slices)} slices were answered")
    return Sent(seconds, analysis)


def slices_per_s(study: Study, transport: Transport, decode_hu: DecodeHu, *, masks: bool = False) -> float:
    """The rate of one study."""
    return len(study.slices) / send_study(study, transport, decode_hu, masks=masks).seconds
