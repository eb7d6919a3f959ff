"""Versions swapped under load: what clients see of fifty promotions and rollbacks, beside what they see without.

Version 1 finds every slice positive, version 2 none: a study whose slices came from both, or whose report names the
wrong one, gives itself away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from groundglass import contract
from groundglass.errors import GroundglassError
from groundglass_bench.figures import Figure
from groundglass_bench.networks import describe_near_free, near_free_unet
from groundglass_bench.result import Measured, Table
from groundglass_bench.serving import Surroundings, swappable_server
from groundglass_bench.settings import Swaps
from groundglass_bench.studies import memory_study
from groundglass_client.chunk import Chunk
from groundglass_client.connection import connect
from groundglass_client.requests import read_scan_answer, scan_request
from groundglass_client.session import SessionSettings, analyse
from groundglass_client.transport import Transport
from groundglass_ensemble.versions import (
    Desk,
    Journal,
    ServerControl,
    VersionFolder,
    Watch,
    promote,
    rollback,
    stage,
    verify,
)

NEVER_POSITIVE: Final = contract.IMAGE_SIDE**2 + 1
TIMEOUT_S: Final = 60.0
PERCENTS: Final = (50, 99, 100)


@dataclass(slots=True)
class _Seen:
    """What the clients saw in one phase: latencies in milliseconds, of chunks of studies and of plain requests."""

    studies: int = 0
    mixed: int = 0
    sent_again: int = 0
    failures: list[str] = field(default_factory=list)
    study_ms: list[float] = field(default_factory=list)
    chunk_ms: list[float] = field(default_factory=list)
    plain_ms: list[float] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """Requests that were answered."""
        return len(self.chunk_ms) + len(self.plain_ms)


def measure_swaps(load: Swaps, around: Surroundings) -> Measured:
    """The load without swaps, then the same while versions change."""
    with swappable_server(around) as (server, repository), ServerControl(server.grpc) as control:
        desk = Desk(VersionFolder(repository), Journal(repository), [control])
        candidate = _candidate(around.scratch / "candidate")
        version = stage(desk, [candidate], new_thresholds=True)
        verify(desk, version, lambda tried: [], new_thresholds=True)
        with _clients(load, server.grpc):
            time.sleep(load.warm_up_s)
        with _clients(load, server.grpc) as quiet:
            time.sleep(load.quiet_s)
        around.tell(f"undisturbed: {quiet.requests} requests")
        swap_s: list[float] = []
        with _clients(load, server.grpc) as disturbed:
            for number in range(load.swaps):
                time.sleep(load.pause_s)
                began = time.perf_counter()
                if number % 2:
                    rollback(desk)
                else:
                    promote(desk, version, Watch(seconds=0.0))
                swap_s.append(time.perf_counter() - began)
        around.tell(f"swapped {len(swap_s)} times: {disturbed.requests} requests")
    return _measured(quiet, disturbed, swap_s)


def _candidate(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.onnx"
    onnx.save(near_free_unet(NEVER_POSITIVE), file)
    describe_near_free(file, NEVER_POSITIVE)
    return file


@contextmanager
def _clients(load: Swaps, server: str) -> Iterator[_Seen]:
    """Clients that call for as long as the block lasts; what they saw is whole after it."""
    seen, lock, stop = _Seen(), threading.Lock(), threading.Event()
    with ExitStack() as stack:
        transports = [stack.enter_context(connect(server)) for _ in range(load.clients)]
        threads = [
            threading.Thread(target=_call, args=(load, transport, seen, lock, stop), name=f"client {number}")
            for number, transport in enumerate(transports)
        ]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def _call(load: Swaps, transport: Transport, seen: _Seen, lock: threading.Lock, stop: threading.Event) -> None:
    study, decode = memory_study(load.slices)
    while not stop.is_set():
        try:
            began = time.perf_counter()
            analysis = analyse(study, transport, decode, SessionSettings(masks=False))
            took_ms = (time.perf_counter() - began) * 1e3
            report = analysis.report
            expected = report.model_version == "1"
            mixed = report.scan_positive != expected or any(item.positive != expected for item in report.slices)
            plain = [_plain(transport, load) for _ in range(load.plain)]
        except GroundglassError as error:
            with lock:
                seen.failures.append(str(error))
            continue
        with lock:
            seen.studies += 1
            seen.mixed += mixed
            seen.sent_again += sum(span.attempts - 1 for span in analysis.spans)
            seen.study_ms.append(took_ms)
            seen.chunk_ms += [(span.answered_s - span.sent_s) * 1e3 for span in analysis.spans]
            seen.plain_ms += plain


def _plain(transport: Transport, load: Swaps) -> float:
    """One slice to whatever is live, as a service without our session sends it: once. Milliseconds."""
    study, decode = memory_study(1)
    chunk = Chunk(np.zeros(1, dtype=np.int32), decode(study.slices[0])[None])
    request = scan_request(chunk, contract.PROBE_STUDY.decode(), 1, masks=False)
    began = time.perf_counter()
    read_scan_answer(chunk, 1, transport.send(request, TIMEOUT_S).result())
    return (time.perf_counter() - began) * 1e3


def _measured(quiet: _Seen, disturbed: _Seen, swap_s: list[float]) -> Measured:
    rows = []
    for what in ("study_ms", "chunk_ms", "plain_ms"):
        for phase, seen in (("undisturbed", quiet), ("swapping", disturbed)):
            found = getattr(seen, what)
            rows.append(
                (
                    f"{what.removesuffix('_ms')}, {phase}",
                    len(found),
                    *(round(_percentile(found, p), 1) for p in PERCENTS),
                )
            )
    return Measured(
        figures=(
            Figure("swaps", "", (float(len(swap_s)),)),
            Figure("requests", "", (float(disturbed.requests),)),
            Figure("failures", "requests or studies", (float(len(disturbed.failures)),)),
            Figure("sent_again", "requests", (float(disturbed.sent_again),)),
            Figure("mixed_studies", "studies", (float(disturbed.mixed),)),
            Figure("swap_time", "s", tuple(swap_s)),
            Figure("worst_chunk_over_undisturbed", "", (_ratio(disturbed.chunk_ms, quiet.chunk_ms, 100),)),
            Figure("worst_plain_over_undisturbed", "", (_ratio(disturbed.plain_ms, quiet.plain_ms, 100),)),
            Figure("p99_plain_over_undisturbed", "", (_ratio(disturbed.plain_ms, quiet.plain_ms, 99),)),
        ),
        tables=(Table("Latency, ms", ("what", "count", "median", "p99", "worst"), tuple(rows)),),
        notes=(
            f"{disturbed.studies} studies and {len(disturbed.plain_ms)} plain requests to ct_scan while "
            f"{len(swap_s)} swaps took place, {quiet.studies} and {len(quiet.plain_ms)} before. A chunk belongs to a "
            "study and goes to its version by name; a plain request goes to whatever is live, and is sent once.",
            *(f"failed: {reason}" for reason in dict.fromkeys(disturbed.failures)),
        ),
    )


def _percentile(values: list[float], percent: int) -> float:
    return float(np.percentile(values, percent)) if values else 0.0


def _ratio(values: list[float], others: list[float], percent: int) -> float:
    return _percentile(values, percent) / max(_percentile(others, percent), 1e-9)
