"""Studies of growing length: the time of a slice stays, and the client's memory is bounded."""

from __future__ import annotations

from contextlib import AbstractContextManager

from groundglass_bench.client_process import ClientRun, run_client
from groundglass_bench.figures import Figure, paired_ratios
from groundglass_bench.memory import MB
from groundglass_bench.result import Chart, Line, Measured
from groundglass_bench.sending import CHUNK_SLICES
from groundglass_bench.serving import Server, Surroundings, near_free_or_given, waiting_server
from groundglass_bench.settings import ScalingSlices


def measure_scaling_slices(load: ScalingSlices, around: Surroundings) -> Measured:
    """Every length in turns, each study from a new process."""
    lengths = sorted(load.studies_of)
    runs: dict[int, list[ClientRun]] = {slices: [] for slices in lengths}
    with _server(load, around) as server:
        for number in range(load.warm_up + load.repetitions):
            for slices in lengths:
                found = run_client(server.grpc, slices)
                if number >= load.warm_up:
                    runs[slices].append(found)
            around.tell(f"round {number + 1}: {lengths[-1]} slices in {found.seconds:.1f} s")
        with_masks = run_client(server.grpc, lengths[-1], masks=True)
    per_slice = {
        slices: Figure(f"slice_ms_{slices}", "ms a slice", tuple(1000 * run.seconds / slices for run in found))
        for slices, found in runs.items()
    }
    growth = {
        slices: Figure(f"growth_{slices}", "MB", tuple(run.growth_bytes / MB for run in found))
        for slices, found in runs.items()
    }
    shortest, longest = lengths[0], lengths[-1]
    ratios = paired_ratios(per_slice[longest].values, per_slice[shortest].values)
    network = f"a network that waits {load.slice_ms:g} ms a slice" if load.slice_ms else "the near-free network"
    return Measured(
        figures=(
            Figure("longest_over_shortest", "", ratios),
            Figure("away_from_linear", "", tuple(abs(ratio - 1) for ratio in ratios)),
            Figure("client_growth", "MB", growth[longest].values),
            Figure("client_growth_masks", "MB", (with_masks.growth_bytes / MB,)),
            *per_slice.values(),
        ),
        charts=(
            Chart("Time of a slice", "slices of the study", "ms a slice", (_line(network, per_slice),)),
            Chart("Memory of the client", "slices of the study", "growth, MB", (_line("without masks", growth),)),
        ),
        notes=(
            f"Slices from memory, {network}. client_growth: the largest resident memory of a client process, less that "
            f"before the study. Masks of {longest} slices are {longest * 32 * 1024 / MB:.0f} MB more.",
        ),
    )


def _server(load: ScalingSlices, around: Surroundings) -> AbstractContextManager[Server]:
    if load.slice_ms and around.server is None:
        return waiting_server(around, load.slice_ms, CHUNK_SLICES)
    return near_free_or_given(around)


def _line(label: str, figures: dict[int, Figure]) -> Line:
    return Line(
        label,
        x=tuple(map(float, figures)),
        y=tuple(figure.median for figure in figures.values()),
        low=tuple(figure.smallest for figure in figures.values()),
        high=tuple(figure.largest for figure in figures.values()),
    )
