"""`groundglass capacity`: from measured figures and a wanted load to a deployment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from groundglass import contract
from groundglass.cli.serving import DEFAULT_REPOSITORY, EMBEDDED_CONFIG, Repository
from groundglass.errors import SettingError

if TYPE_CHECKING:
    from groundglass.capacity import Capacity, Demand, Memory, Replica, Sending

SERVED_KIND: Final = "efficiency"
SERVED_FIGURE: Final = "served"
"""The result that tells a replica's pace: a whole study from disk to verdict, by the real network."""

_MIB: Final = 1 << 20
_MBIT: Final = 1e6 / 8


@dataclass(frozen=True, slots=True)
class _Pace:
    """Slices a second of one replica, and who says so."""

    slices_per_s: float
    source: str
    on_gpu: bool


def capacity(
    studies_per_hour: Annotated[float, typer.Option(help="Studies that arrive in an hour, in the busiest one.")],
    slices_per_s: Annotated[float | None, typer.Option(help="Pace of one replica, measured by you.")] = None,
    measured: Annotated[
        Path | None,
        typer.Option(help="Or a result of groundglass bench, scenario efficiency: efficiency-1000.json."),
    ] = None,
    slices_per_study: Annotated[int, typer.Option(help="Slices of a study.")] = 1000,
    deadline_s: Annotated[
        float | None, typer.Option(help="Seconds from a study's first request to its verdict, for 19 of 20.")
    ] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the replicas' pace that the load may take.")] = 0.7,
    spare: Annotated[int, typer.Option(help="Replicas that may fail, or be upgraded, meanwhile.")] = 1,
    clients: Annotated[
        int | None, typer.Option(help="Studies under way at once. Default: what the load makes likely.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of a slice.")] = contract.IMAGE_SIDE,
    columns: Annotated[int, typer.Option(help="Columns of a slice.")] = contract.IMAGE_SIDE,
    masks: Annotated[bool, typer.Option(help="Whether clients ask for lesion masks.")] = True,
    window: Annotated[int | None, typer.Option(help="Requests in flight of a study. Default: the client's.")] = None,
    chunk_mib: Annotated[int | None, typer.Option(help="Pixels of a request, MiB. Default: the client's.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Servers without a GPU. Default: what was measured.")] = False,
    repository: Repository = DEFAULT_REPOSITORY,
    json_out: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Work out how many replicas a load needs, how long studies take there, and what memory and network they use."""
    from groundglass.capacity import Demand, plan_capacity

    pace = _pace(slices_per_s, measured, cpu=cpu)
    demand = Demand(studies_per_hour, slices_per_study, deadline_s, rows, columns, masks, clients, utilisation, spare)
    replica = _replica(pace, repository)
    sending = _sending(window, chunk_mib)
    planned = plan_capacity(demand, replica, sending)
    plan = _Plan(demand, replica, sending, planned, pace.source)
    if json_out:
        print(json.dumps(plan.to_json(), indent=2))
        return
    for what, value in plan.rows():
        print(f"{what:22} {value}")


def _pace(slices_per_s: float | None, measured: Path | None, *, cpu: bool) -> _Pace:
    if (slices_per_s is None) == (measured is None):
        raise SettingError("a replica's pace comes from --slices-per-s or from --measured FILE: give one of the two")
    if measured is not None:
        return _measured(measured, cpu=cpu)
    assert slices_per_s is not None  # noqa: S101 - one of the two is given
    return _Pace(slices_per_s, "--slices-per-s", not cpu)


def _measured(file: Path, *, cpu: bool) -> _Pace:
    """The pace in a result of ``groundglass bench``. Raises SettingError for a file that tells none."""
    from groundglass_bench.result import read_result

    result = read_result(file)
    if result.kind != SERVED_KIND or result.quick or result.measured is None:
        how = "a quick run of " if result.quick else "a failed run of " if result.measured is None else ""
        raise SettingError(
            f"--measured {file}: holds {how}scenario {result.scenario}, which does not tell the pace of a replica; "
            "expected a full run of scenario efficiency-1000 or efficiency-300"
        )
    host = result.host
    pace = next(figure.median for figure in result.measured.figures if figure.name == SERVED_FIGURE)
    gpu = host["gpu"]["name"] if host["gpu"] else "no GPU"
    machine = f"{host['processor']}, {host['cores']} cores, {gpu}"
    version = f"groundglass {host['versions']['groundglass']}, commit {host['commit']}"
    return _Pace(pace, f"{file}: {machine}, {version}, {host['date']}", bool(host["gpu"]) and not cpu)


def _replica(pace: _Pace, repository: Path) -> Replica:
    """A replica as the model configs of ``repository`` describe it. Raises RepositoryError, SettingError."""
    from groundglass.capacity import Replica
    from groundglass_ensemble.repository import config_file, read_config
    from groundglass_ensemble.study_table import TableSettings

    name = None if pace.on_gpu else EMBEDDED_CONFIG
    file = config_file(repository / contract.UNET.name, name)
    unet = read_config(file)
    aggregator = read_config(config_file(repository / contract.SCAN_AGGREGATOR.name, name))
    queue = unet.dynamic_batching.default_queue_policy.max_queue_size
    if not queue:
        raise SettingError(f"{file}: default_queue_policy has no max_queue_size, so a replica's memory has no bound")
    parameters = {key: value.string_value for key, value in aggregator.parameters.items()}
    return Replica(
        slices_per_s=pace.slices_per_s,
        on_gpu=pace.on_gpu,
        instances=sum(group.count or 1 for group in unet.instance_group) or 1,
        max_batch=unet.max_batch_size,
        max_queue_requests=queue,
        max_studies=TableSettings.from_parameters(parameters).max_studies,
    )


def _sending(window: int | None, chunk_mib: int | None) -> Sending:
    from groundglass.capacity import Sending
    from groundglass_client.settings import DEFAULT_SETTINGS as CLIENT

    given = None if chunk_mib is None else chunk_mib * _MIB
    return Sending(
        chunk_bytes=CLIENT.chunk_bytes_of(shared=False) if given is None else given,
        shared_chunk_bytes=CLIENT.chunk_bytes_of(shared=True) if given is None else given,
        window=CLIENT.window if window is None else window,
        ahead=CLIENT.ahead,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What was asked, what it was worked out from, and what came of it."""

    demand: Demand
    replica: Replica
    sending: Sending
    planned: Capacity
    source: str

    def to_json(self) -> dict[str, Any]:
        memory = self.planned.memory
        sums = {"expected_bytes": memory.expected_bytes, "bound_bytes": memory.bound_bytes}
        return {
            "demand": asdict(self.demand),
            "replica": {**asdict(self.replica), "source": self.source},
            "sending": asdict(self.sending),
            "deployment": {**asdict(self.planned), "memory": {**asdict(memory), **sums}},
        }

    def rows(self) -> Iterator[tuple[str, str]]:
        planned, times, pace = self.planned, self.planned.times, self.replica.slices_per_s
        yield "replicas", f"{planned.replicas}: {planned.needed} needed, {self.demand.spare} spare"
        yield "GPUs", self._gpus()
        yield "pace of a replica", f"{pace:.4g} slices/s ({self.source})"
        yield "load", f"{self.demand.slices_per_s:.4g} slices/s, {times.load:.0%} of what the needed replicas do"
        yield "a study alone", f"{times.alone_s:.3g} s, on {times.spread} of the replicas at once"
        yield "at this load", f"{times.mean_s:.3g} s in the mean, 19 of 20 within {times.most_s:.3g} s"
        yield "studies under way", f"{planned.clients}, with {self.sending.window} requests each"
        yield from _memory_rows(planned.memory)
        traffic = planned.traffic
        yield "network, a replica", f"{_rates(traffic.replica_in, traffic.replica_out)} at full pace"
        yield "network, balancer", f"{_rates(traffic.load_in, traffic.load_out)} at this load"
        yield "", f"{_rates(traffic.peak_in, traffic.peak_out)} with all replicas at full pace"
        yield "note", "calculated, not measured: run groundglass bench against what you deploy"

    def _gpus(self) -> str:
        if not self.planned.gpus:
            return "none: the embedded server with --model-config-name=cpu is meant"
        instances = self.replica.instances
        return f"{self.planned.gpus}: one a replica; instances of unet on each: {instances}, as its config.pbtxt says"


def _memory_rows(memory: Memory) -> Iterator[tuple[str, str]]:
    yield "memory of a replica", f"{_size(memory.expected_bytes)} expected; limit it to {_size(memory.bound_bytes)}"
    yield "  server and stages", f"{_size(memory.base_bytes)}, of a CPU server: CUDA's own is not measured"
    under_way = f"{memory.requests} under way; {memory.queue_requests} when unet's queue is full"
    yield "  requests", f"{_size(memory.request_bytes)} each, {under_way}"
    yield "  scan_aggregator", _size(memory.aggregator_bytes)
    yield "  shared memory", f"{_size(memory.stage_shm_bytes)}: the least shm_size of its container"
    yield "  and of clients", f"{_size(memory.client_shm_bytes)} more shm_size for each on the same host"


def _size(number: float) -> str:
    mib = number / _MIB
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def _rates(inward: float, outward: float) -> str:
    """Bytes a second as networks are sold."""
    said_in, said_out = (f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}" for rate in (inward / _MBIT, outward / _MBIT))
    return f"{said_in} Mbit/s in, {said_out} out"
