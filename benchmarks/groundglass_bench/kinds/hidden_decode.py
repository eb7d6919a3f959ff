"""Hidden decoding: a study from disk takes as long as one that lies decoded in memory."""

from __future__ import annotations

import time

from groundglass_bench.figures import Figure, paired_ratios, take_turns
from groundglass_bench.result import Measured
from groundglass_bench.sending import WARM_UP_SLICES, send_study
from groundglass_bench.serving import Surroundings, real_server
from groundglass_bench.settings import HiddenDecode
from groundglass_bench.studies import decoded, opened_repeated, repeated_study, study_folder
from groundglass_client.connection import connect
from groundglass_client.intake import decode_hu


def measure_hidden_decode(load: HiddenDecode, around: Surroundings) -> Measured:
    """Seconds of both in turns; reading the headers counts for the study from disk."""
    folder = study_folder(around.study, around.scratch, load.files, load.syntax)
    with (
        real_server(around) as server,
        connect(server.grpc) as transport,
        opened_repeated(folder, load.slices) as study,
    ):
        in_memory = decoded(study)

        def from_disk() -> float:
            started = time.perf_counter()
            with opened_repeated(folder, load.slices) as opened:
                send_study(opened, transport, decode_hu)
            return time.perf_counter() - started

        def from_memory() -> float:
            return send_study(study, transport, in_memory).seconds

        for _ in range(load.warm_up):
            send_study(repeated_study(study, min(load.slices, WARM_UP_SLICES)), transport, decode_hu)
        seconds = take_turns({"disk": from_disk, "memory": from_memory}, load.repetitions)
    syntax = study.series.transfer_syntax or "pictures"
    return Measured(
        figures=(
            Figure("disk_over_memory", "", paired_ratios(seconds["disk"], seconds["memory"])),
            Figure("disk", "s", seconds["disk"]),
            Figure("memory", "s", seconds["memory"]),
        ),
        notes=(f"{load.slices} slices, transfer syntax {syntax}.",),
    )
