"""Serving efficiency: a study from DICOM on disk to its verdict, over the bare engine on the same machine."""

from __future__ import annotations

import time

from groundglass_bench.bare_engine import bare_ways, fastest
from groundglass_bench.client_stages import client_table
from groundglass_bench.figures import Figure, bracketed_ratios
from groundglass_bench.result import Measured, Table
from groundglass_bench.sending import WARM_UP_SLICES, Sent, send_study
from groundglass_bench.server_statistics import difference, read_statistics, stage_table
from groundglass_bench.serving import Surroundings, real_server
from groundglass_bench.settings import Efficiency
from groundglass_bench.studies import opened_repeated, study_folder
from groundglass_client.connection import connect
from groundglass_client.intake import decode_hu
from groundglass_client.spans import ChunkSpan


def measure_efficiency(load: Efficiency, around: Surroundings) -> Measured:
    """Turns of bare, served, bare, served, ..., bare: each study over the mean of the two bare turns around it."""
    folder = study_folder(around.study, around.scratch, load.files, load.syntax)
    ways = bare_ways(around)
    with real_server(around) as server, connect(server.grpc) as transport:

        def served(slices: int) -> tuple[float, Sent]:
            started = time.perf_counter()
            with opened_repeated(folder, slices) as study:
                sent = send_study(study, transport, decode_hu)
            return slices / (time.perf_counter() - started), sent

        best, tried = fastest(ways, load.probe_s)
        around.tell(f"fastest bare engine: {best}, {tried[best]:.2f} slices/s")
        for _ in range(load.warm_up):
            served(min(load.slices, WARM_UP_SLICES))
        before = read_statistics(server.grpc)
        bare, rates = [ways[best](load.bare_s)], []
        spans: list[ChunkSpan] = []
        for _ in range(load.repetitions):
            rate, sent = served(load.slices)
            rates.append(rate)
            spans += sent.analysis.spans
            bare.append(ways[best](load.bare_s))
            around.tell(f"served {rate:.2f} slices/s, bare {bare[-1]:.2f}")
        stages = stage_table(difference(before, read_statistics(server.grpc)))
    tries = Table(
        "Bare engine, tried", ("way", "slices/s"), tuple((way, round(rate, 2)) for way, rate in tried.items())
    )
    return Measured(
        figures=(
            Figure("efficiency", "", bracketed_ratios(rates, bare)),
            Figure("served", "slices/s", tuple(rates)),
            Figure("bare", "slices/s", tuple(bare)),
        ),
        tables=(stages, client_table(spans), tries),
        notes=(
            f"{load.slices} slices from disk ({_named(around, load.files, load.syntax)}), headers, decoding and "
            f"verdict included. Bare: {best}, images in memory.",
        ),
    )


def _named(around: Surroundings, files: int, syntax: str) -> str:
    return "the study given, repeated" if around.study is not None else f"a phantom of {files} {syntax} files, repeated"
