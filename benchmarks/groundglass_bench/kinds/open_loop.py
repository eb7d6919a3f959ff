"""An open loop: studies arrive at random times whatever the server does, as they do in a hospital.

Latency is shown against the share of the capacity that is offered, up to more than the server can do; and afterwards it
must be itself again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from groundglass_bench.figures import Figure, paired_ratios
from groundglass_bench.load import Load, LoadResult, run_load
from groundglass_bench.memory import MB, children_bytes, group_bytes, watched
from groundglass_bench.result import Chart, Line, Measured, Table
from groundglass_bench.serving import Server, Surroundings, real_server, waiting_server
from groundglass_bench.settings import OpenLoop

MOST_IN_FLIGHT: Final = 1000
"""Of the generator: the server is to be put to the test, not the generator's own bound."""

OVERLOAD_WORDS: Final = re.compile(
    r"overload|queue|exhausted|unavailable|refused by the generator|deadline|timed? ?out", re.IGNORECASE
)
"""A failure under overload says one of these; any other is a defect."""

STUDY_TIMEOUT_S: Final = 120.0
PERCENTS: Final = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class _Overload:
    """More than the server can do, for a while; memory at its most, in MB, and before."""

    result: LoadResult
    before_mb: dict[str, float]
    peak_mb: dict[str, float]

    @property
    def unclear(self) -> int:
        """Failures whose reason does not say that there was too much to do."""
        return sum(count for reason, count in self.result.failures.items() if not OVERLOAD_WORDS.search(reason))


def measure_open_loop(load: OpenLoop, around: Surroundings) -> Measured:
    """Capacity by a closed loop, then every share of it in turns, then the overload and what comes after it."""
    with _server(load, around) as server:
        capacity = _capacity(load, server)
        around.tell(f"capacity {capacity:.2f} studies/s")

        def offer(share: float, duration_s: float, seed: int) -> LoadResult:
            result = run_load(_open(load, server, share * capacity, duration_s, seed), server.grpc)
            around.tell(f"{share:.0%} offered: median {result.latency_s(50):.3f} s, p99 {result.latency_s(99):.3f} s")
            return result

        shares = sorted(load.offered)
        found: dict[float, list[LoadResult]] = {share: [] for share in shares}
        for seed in range(load.warm_up + load.repetitions):
            for share in shares:
                result = offer(share, load.duration_s, seed)
                if seed >= load.warm_up:
                    found[share].append(result)
        overload = _overloaded(server, lambda: offer(load.overload, load.overload_s, 0))
        after = [
            offer(shares[0], load.duration_s, seed) for seed in range(load.warm_up, load.warm_up + load.repetitions)
        ]
    return _measured(load, capacity, found, overload, after)


@contextmanager
def _server(load: OpenLoop, around: Surroundings) -> Iterator[Server]:
    given = around.server is not None
    with real_server(around) if given else waiting_server(around, load.slice_ms, load.slices, load.instances) as server:
        yield server


def _capacity(load: OpenLoop, server: Server) -> float:
    """Studies a second with so many users that the server is never without work."""
    closed = Load(
        users=load.users,
        slices=load.slices,
        duration_s=load.duration_s,
        warm_up_s=load.warm_up_s,
        expected_run=_expected_run(load, server),
        study_timeout_s=STUDY_TIMEOUT_S,
    )
    return run_load(closed, server.grpc).slices_per_s / load.slices


def _open(load: OpenLoop, server: Server, rate_per_s: float, duration_s: float, seed: int) -> Load:
    return Load(
        loop="open",
        rate_per_s=rate_per_s,
        slices=load.slices,
        duration_s=duration_s,
        warm_up_s=load.warm_up_s,
        max_in_flight=MOST_IN_FLIGHT,
        seed=seed,
        expected_run=_expected_run(load, server),
        study_timeout_s=STUDY_TIMEOUT_S,
    )


def _expected_run(load: OpenLoop, server: Server) -> int | None:
    """The waiting network, which is ours, finds every slice positive."""
    return load.slices if server.pid else None


def _overloaded(server: Server, offer: Callable[[], LoadResult]) -> _Overload:
    readings: dict[str, Callable[[], int]] = {"generator": lambda: children_bytes(server.pid)}
    if server.pid:
        readings["server"] = lambda: group_bytes(server.pid)
    before = {name: read() / MB for name, read in readings.items()}
    with watched(readings) as peaks:
        result = offer()
    return _Overload(result, before, {name: peak / MB for name, peak in peaks.items()})


def _measured(
    load: OpenLoop,
    capacity: float,
    found: dict[float, list[LoadResult]],
    overload: _Overload,
    after: list[LoadResult],
) -> Measured:
    shares = list(found)
    light, heavy = shares[0], shares[-1]
    p99 = {share: tuple(result.latency_s(99) for result in results) for share, results in found.items()}
    medians = [result.latency_s(50) for result in found[light]]
    failures = sum(sum(result.failures.values()) for results in found.values() for result in results)
    server_mb = overload.peak_mb.get("server")
    figures = [
        Figure("p99_over_unloaded", "", paired_ratios(p99[heavy], p99[light])),
        Figure("failures", "studies", (float(failures),)),
        Figure("overload_unclear_failures", "studies", (float(overload.unclear),)),
        Figure("recovered_over_unloaded", "", paired_ratios([result.latency_s(50) for result in after], medians)),
        Figure("overload_generator_memory", "MB", (overload.peak_mb["generator"],)),
        Figure("capacity", "studies/s", (capacity,)),
    ]
    if server_mb is not None:
        figures.insert(4, Figure("overload_server_growth", "MB", (server_mb - overload.before_mb["server"],)))
    return Measured(
        figures=tuple(figures),
        tables=(_table(found, overload),),
        charts=(_chart(found),),
        absent={}
        if server_mb is not None
        else {"overload_server_growth": "the server is not ours: its memory is unseen"},
        notes=(
            f"Studies of {load.slices} slices. p99_over_unloaded: p99 at {heavy:.0%} of the capacity over p99 at "
            f"{light:.0%}. recovered_over_unloaded: the median at {light:.0%} after the overload over that before.",
            f"In {load.overload_s:g} s of overload {sum(overload.result.failures.values())} studies failed"
            + "".join(f"; {count} times: {reason}" for reason, count in overload.result.failures.items()),
        ),
    )


def _table(found: dict[float, list[LoadResult]], overload: _Overload) -> Table:
    rows = []
    for share, results in [*found.items(), (overload.result.load.rate_per_s, [overload.result])]:
        name = f"{share:.0%}" if share in found else "overload"
        latencies = (Figure("", "s", tuple(result.latency_s(p) for result in results)).median for p in PERCENTS)
        rows.append(
            (
                name,
                sum(len(result.samples) for result in results),
                sum(sum(result.failures.values()) for result in results),
                *(round(latency, 3) for latency in latencies),
                max(result.most_in_flight for result in results),
            )
        )
    return Table(
        "Latency of a study, s, from its arrival",
        ("offered", "studies", "failed", *(f"p{percent}" for percent in PERCENTS), "most in flight"),
        tuple(rows),
    )


def _chart(found: dict[float, list[LoadResult]]) -> Chart:
    lines = []
    for percent in PERCENTS:
        figures = [Figure("", "s", tuple(r.latency_s(percent) for r in results)) for results in found.values()]
        lines.append(
            Line(
                f"p{percent}",
                x=tuple(100 * share for share in found),
                y=tuple(figure.median for figure in figures),
                low=tuple(figure.smallest for figure in figures),
                high=tuple(figure.largest for figure in figures),
            )
        )
    return Chart("Latency against load", "offered, % of the capacity", "latency, s", tuple(lines))
