"""Users side by side, each with a study under way at all times: they share the server, and lose nothing by it."""

from __future__ import annotations

from groundglass_bench.figures import Figure, paired_ratios
from groundglass_bench.load import Load, LoadResult, run_load
from groundglass_bench.result import Chart, Line, Measured, Table
from groundglass_bench.serving import Surroundings, near_free_or_given
from groundglass_bench.settings import ScalingUsers


def measure_scaling_users(load: ScalingUsers, around: Surroundings) -> Measured:
    """Every number of users in turns."""
    levels = sorted(load.users)
    found: dict[int, list[LoadResult]] = {users: [] for users in levels}
    with near_free_or_given(around) as server:
        for number in range(load.warm_up + load.repetitions):
            for users in levels:
                result = run_load(
                    Load(users=users, slices=load.slices, duration_s=load.duration_s, warm_up_s=load.warm_up_s),
                    server.grpc,
                )
                around.tell(f"round {number + 1}: {users} users, {result.slices_per_s:.0f} slices/s")
                if number >= load.warm_up:
                    found[users].append(result)
    rates = {
        users: Figure(f"users_{users}", "slices/s", tuple(result.slices_per_s for result in results))
        for users, results in found.items()
    }
    failures = sum(sum(result.failures.values()) for results in found.values() for result in results)
    few, many = levels[0], levels[-1]
    return Measured(
        figures=(
            Figure("most_over_fewest", "", paired_ratios(rates[many].values, rates[few].values)),
            Figure("failures", "studies", (float(failures),)),
            *rates.values(),
        ),
        tables=(_latencies(found),),
        charts=(Chart("Throughput", "users", "slices/s", (_line(rates),)),),
        notes=(f"most_over_fewest: throughput of {many} users over that of {few}. Studies of {load.slices} slices.",),
    )


def _latencies(found: dict[int, list[LoadResult]]) -> Table:
    rows = []
    for users, results in found.items():
        seconds = [Figure("", "s", tuple(result.latency_s(percent) for result in results)) for percent in (50, 99)]
        rows.append((users, sum(len(result.samples) for result in results), *(round(s.median, 3) for s in seconds)))
    return Table("Latency of a study, s", ("users", "studies", "median", "p99"), tuple(rows))


def _line(rates: dict[int, Figure]) -> Line:
    figures = rates.values()
    return Line(
        "all users together",
        x=tuple(map(float, rates)),
        y=tuple(figure.median for figure in figures),
        low=tuple(figure.smallest for figure in figures),
        high=tuple(figure.largest for figure in figures),
    )
