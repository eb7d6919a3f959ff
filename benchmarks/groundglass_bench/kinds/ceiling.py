"""The ceiling: how many slices a second travel when the network costs next to nothing."""

from __future__ import annotations

from functools import partial

from groundglass_bench.figures import Figure, take_turns
from groundglass_bench.result import Measured
from groundglass_bench.sending import slices_per_s
from groundglass_bench.server_statistics import difference, read_statistics, stage_table
from groundglass_bench.serving import Surroundings, near_free_server
from groundglass_bench.settings import Ceiling
from groundglass_bench.studies import memory_study
from groundglass_client.connection import connect


def measure_ceiling(load: Ceiling, around: Surroundings) -> Measured:
    """gRPC and shared memory, with and without masks, in turns."""
    study, decode = memory_study(load.slices)
    with (
        near_free_server(around) as server,
        connect(server.grpc, shared_memory=False) as grpc,
        connect(server.grpc) as shared,
    ):
        works = {
            "grpc": partial(slices_per_s, study, grpc, decode),
            "grpc_masks": partial(slices_per_s, study, grpc, decode, masks=True),
            "shared_memory": partial(slices_per_s, study, shared, decode),
            "shared_memory_masks": partial(slices_per_s, study, shared, decode, masks=True),
        }
        before = read_statistics(server.grpc)
        rates = take_turns(works, load.repetitions, load.warm_up)
        stages = stage_table(difference(before, read_statistics(server.grpc)))
    return Measured(
        figures=tuple(Figure(name, "slices/s", found) for name, found in rates.items()),
        tables=(stages,),
        notes=(
            f"{load.slices} slices of 512x512, decoded in memory; near-free network, real preprocess and aggregator.",
        ),
    )
