"""Replicas: one study over two servers takes half the time, where the network is what takes it."""

from __future__ import annotations

from functools import partial

from groundglass_bench.figures import Figure, paired_ratios, take_turns
from groundglass_bench.result import Measured
from groundglass_bench.sending import CHUNK_SLICES, slices_per_s
from groundglass_bench.serving import Surroundings, waiting_server
from groundglass_bench.settings import ScalingReplicas
from groundglass_bench.studies import memory_study
from groundglass_client.connection import connect


def measure_scaling_replicas(load: ScalingReplicas, around: Surroundings) -> Measured:
    """The same study over one server and over both, in turns."""
    study, decode = memory_study(load.slices)
    with (
        waiting_server(around, load.slice_ms, CHUNK_SLICES) as first,
        waiting_server(around, load.slice_ms, CHUNK_SLICES) as second,
        connect(first.grpc) as one,
        connect(f"{first.grpc},{second.grpc}") as both,
    ):
        works = {
            "one_server": partial(slices_per_s, study, one, decode),
            "two_servers": partial(slices_per_s, study, both, decode),
        }
        rates = take_turns(works, load.repetitions, load.warm_up)
    return Measured(
        figures=(
            Figure("two_over_one", "", paired_ratios(rates["two_servers"], rates["one_server"])),
            *(Figure(name, "slices/s", found) for name, found in rates.items()),
        ),
        notes=(f"{load.slices} slices; the network waits {load.slice_ms:g} ms for each, and leaves the cores free.",),
    )
