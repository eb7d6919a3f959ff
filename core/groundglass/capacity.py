"""Capacity: from a wanted load and measured figures to a deployment. Values and functions; nothing is read here.

The queueing model: studies arrive at random (Poisson), and a study keeps at most ``spread`` replicas busy, because its
client has a window of requests. ``replicas / spread`` then are places that serve one study each, and studies that find
none free share: the M/G/k queue with processor sharing, whose mean holds for any mixture of study sizes. What a study
waits grows without bound as the load nears what the replicas can do, which is what headroom is for: with one place a
study takes 1 / (1 - load) times as long as alone, 3.3 times at 70 %, 10 times at 90 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from groundglass import contract
from groundglass.contract import TensorSpec
from groundglass.errors import SettingError

MIB: Final = 1 << 20

STUDY_KEY_BYTES: Final = 4 + 32
"""A study key on the wire: its length, and the 32 digits that clients give it."""

REQUESTS_TO_KEEP_BUSY: Final = 2
"""Requests of one study that keep a replica busy: one is computed while the next is on its way. A window of four kept
two replicas at 1.97 times the pace of one (benchmarks/results/bench-cpu/scaling-replicas.json); more was not
measured."""

LATE_SHARE: Final = 0.05
"""Studies that may take longer than ``most_s``: it is met by 19 of 20."""

SERVER_BASE_BYTES: Final = 384 * MIB
"""A replica without its requests: the embedded server with the shipped INT8 network, its stages and their workspace.
One study alone took it to 383 MiB, requests included (PSS, 2 cores, 2026-11-24). A GPU server adds CUDA's and
TensorRT's own host memory, which is not measured."""

STAGE_REGION_BYTES: Final = 3 * MIB
"""Shared memory of one Python stage at rest: 1 MiB for scan_aggregator, 3 MiB for a stand-in after its first inference
(tritonserver 2.51, 2026-11-24)."""

BATCHES_IN_REGION: Final = 2
"""Batches that a stage's region came to hold under load: one being computed, one coming or going (2026-11-24: 26 MiB
for requests of 12, 133 MiB for batches of 66). A region never shrinks."""

STUDY_ENTRY_BYTES: Final = 512
"""What the aggregator keeps of a study besides its byte a slice: 419 bytes (CPython 3.11, 2026-11-24)."""

_ELEMENT_BYTES: Final = {"INT16": 2, "INT32": 4, "FP32": 4, "UINT8": 1, "BOOL": 1}
_SECONDS_AN_HOUR: Final = 3600


def slice_bytes(spec: TensorSpec, rows: int = 0, columns: int = 0) -> int:
    """Bytes of one slice's row of a tensor of the contract; ``rows`` x ``columns`` stand for its free dimensions."""
    if spec is contract.STUDY:
        return STUDY_KEY_BYTES
    pixels = rows * columns if contract.ANY in spec.dims else math.prod(spec.dims)
    return pixels * _ELEMENT_BYTES[spec.datatype]


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of a deployment.

    deadline_s: wanted time from a study's first request to its verdict, for 19 of 20 studies; None for none.
    rows, columns: pixels of a slice.
    masks: whether clients ask for the lesion masks.
    clients: studies under way at once; None for what the load makes likely.
    utilisation: share of the replicas' pace that the load may take.
    spare: replicas that may fail, or be upgraded, with the demand still met.
    """

    studies_per_hour: float
    slices_per_study: int = 1000
    deadline_s: float | None = None
    rows: int = contract.IMAGE_SIDE
    columns: int = contract.IMAGE_SIDE
    masks: bool = True
    clients: int | None = None
    utilisation: float = 0.7
    spare: int = 1

    def __post_init__(self) -> None:
        _require_positive("studies per hour", self.studies_per_hour)
        _require("slices per study", self.slices_per_study, 1, contract.MAX_SCAN_SLICES)
        _require("rows", self.rows, 1)
        _require("columns", self.columns, 1)
        _require("spare replicas", self.spare, 0)
        if self.deadline_s is not None:
            _require_positive("deadline in seconds", self.deadline_s)
        if self.clients is not None:
            _require("clients", self.clients, 1)
        if not 0 < self.utilisation < 1:
            raise SettingError(f"utilisation {self.utilisation:g}: expected a share between 0 and 1, such as 0.7")

    @property
    def slices_per_s(self) -> float:
        """The pace that the load asks for."""
        return self.studies_per_hour * self.slices_per_study / _SECONDS_AN_HOUR

    @property
    def message_bytes(self) -> int:
        """One slice on its way to a server."""
        return sum(slice_bytes(spec, self.rows, self.columns) for spec in contract.CT_SCAN.inputs)

    @property
    def answer_bytes(self) -> int:
        """One slice's answer."""
        outputs = contract.CT_SCAN.outputs
        return sum(slice_bytes(spec) for spec in outputs if self.masks or spec is not contract.MASK)


@dataclass(frozen=True, slots=True)
class Replica:
    """One server: its measured pace, and what its model configs say.

    on_gpu: whether unet asks for a GPU. Otherwise the embedded server is meant, whose networks are Python stages too.
    instances: of unet, on one GPU. ``max_queue_requests``: what may wait for it before clients are turned away.
    """

    slices_per_s: float
    on_gpu: bool
    instances: int
    max_batch: int
    max_queue_requests: int
    max_studies: int

    def __post_init__(self) -> None:
        _require_positive("slices a second of one replica", self.slices_per_s)


@dataclass(frozen=True, slots=True)
class Sending:
    """How a client sends a study, by its settings: pixels of a request as bytes and in shared memory, requests in
    flight, decoded chunks that wait.
    """

    chunk_bytes: int
    shared_chunk_bytes: int
    window: int
    ahead: int

    def __post_init__(self) -> None:
        _require("chunk bytes", min(self.chunk_bytes, self.shared_chunk_bytes), 1)
        _require("window", self.window, 1)

    def slices_per_chunk(self, demand: Demand, *, shared: bool = False) -> int:
        """Slices of one request."""
        pixels = slice_bytes(contract.HU, demand.rows, demand.columns)
        return max(1, min(contract.MAX_BATCH, (self.shared_chunk_bytes if shared else self.chunk_bytes) // pixels))

    def ring_bytes(self, demand: Demand) -> int:
        """Shared memory of one client: a region for each chunk that may exist, with room for its masks."""
        slice_size = slice_bytes(contract.HU, demand.rows, demand.columns) + slice_bytes(contract.MASK)
        return (self.window + self.ahead) * self.slices_per_chunk(demand, shared=True) * slice_size

    def spread(self, demand: Demand, replicas: int) -> int:
        """Replicas that one study keeps busy."""
        chunks = math.ceil(demand.slices_per_study / self.slices_per_chunk(demand))
        return min(replicas, chunks, max(1, self.window // REQUESTS_TO_KEEP_BUSY))


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds from a study's first request to its verdict: alone on the replicas, in the mean at the load, and the time
    that 19 of 20 studies keep. ``load`` is the share of the replicas' pace that is taken; at 1 the waits never end.
    """

    load: float
    spread: int
    alone_s: float
    mean_s: float
    most_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Host memory of one replica, in bytes.

    request_bytes: one request under way: its pixels, IMAGE between the stages, its answer.
    requests: under way at one replica when the load is spread evenly. ``queue_requests``: when unet's queue is full.
    stage_shm_bytes: /dev/shm of the Python stages, a part of the sums. ``client_shm_bytes``: of each client on the same
    host that uses shared memory, not a part of them.
    """

    base_bytes: int
    request_bytes: int
    requests: int
    queue_requests: int
    aggregator_bytes: int
    stage_shm_bytes: int
    client_shm_bytes: int

    @property
    def expected_bytes(self) -> int:
        """With the requests of the load."""
        return self._with(self.requests)

    @property
    def bound_bytes(self) -> int:
        """With the queue full: what to limit a container to."""
        return self._with(max(self.requests, self.queue_requests))

    def _with(self, requests: int) -> int:
        return self.base_bytes + requests * self.request_bytes + self.aggregator_bytes + self.stage_shm_bytes


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes a second of payload. Framing and TLS add less than 1 %.

    A replica's is that of its full pace. The balancer's is that of the load, and of all replicas at full pace.
    """

    replica_in: float
    replica_out: float
    load_in: float
    load_out: float
    peak_in: float
    peak_out: float


@dataclass(frozen=True, slots=True)
class Capacity:
    """A deployment that meets the demand: ``needed`` replicas do, ``replicas`` do when as many fail as may.

    ``times`` are those of the needed ones alone. ``clients`` are the studies under way at once.
    """

    needed: int
    replicas: int
    gpus: int
    times: Times
    clients: int
    memory: Memory
    traffic: Traffic


def plan_capacity(demand: Demand, replica: Replica, sending: Sending) -> Capacity:
    """The smallest deployment for ``demand``. Raises SettingError when no number of replicas meets its deadline."""
    needed = _replicas_needed(demand, replica, sending)
    times = study_times(demand, replica, sending, needed)
    clients = demand.clients or _likely_clients(demand, times)
    replicas = needed + demand.spare
    return Capacity(
        needed=needed,
        replicas=replicas,
        gpus=replicas if replica.on_gpu else 0,
        times=times,
        clients=clients,
        memory=_memory(demand, replica, sending, math.ceil(clients * sending.window / needed)),
        traffic=_traffic(demand, replica, replicas),
    )


def study_times(demand: Demand, replica: Replica, sending: Sending, replicas: int) -> Times:
    """How long studies take on so many replicas. The module says by which model."""
    spread = sending.spread(demand, replicas)
    alone_s = demand.slices_per_study / (replica.slices_per_s * spread)
    load = demand.slices_per_s / (replica.slices_per_s * replicas)
    if load >= 1:
        return Times(load, spread, alone_s, math.inf, math.inf)
    places = replicas / spread
    # The chance that no place is free, by Sakasegawa's approximation (1977): exact for one place, and good for broken
    # numbers of them, which Erlang's formula does not know.
    busy = load ** (math.sqrt(2 * (places + 1)) - 1)
    wait_s = alone_s / (places * (1 - load))  # of those who find no place free, in the mean; taken as exponential
    most_s = alone_s + wait_s * max(0.0, math.log(busy / LATE_SHARE)) if busy else alone_s
    return Times(load, spread, alone_s, alone_s + busy * wait_s, most_s)


def _replicas_needed(demand: Demand, replica: Replica, sending: Sending) -> int:
    """By the load alone, then more until the deadline is kept: from some number on a study is as fast as alone."""
    pace = demand.utilisation * replica.slices_per_s
    needed = max(1, math.ceil(demand.slices_per_s / pace - 1e-9))  # 3.0000000001 is a rounded 3
    if demand.deadline_s is None:
        return needed
    widest = sending.spread(demand, contract.MAX_SCAN_SLICES)
    best_s = demand.slices_per_study / (replica.slices_per_s * widest)
    if demand.deadline_s < best_s:
        raise SettingError(
            f"a deadline of {demand.deadline_s:g} s can't be met: a study of {demand.slices_per_study} slices takes "
            f"{best_s:.3g} s when it has all replicas to itself, at {replica.slices_per_s:g} slices/s each; with a "
            f"window of {sending.window} it keeps {widest} of them busy. Expected a longer deadline, a faster replica "
            "or a wider window"
        )
    while study_times(demand, replica, sending, needed).most_s > demand.deadline_s:
        needed += 1
    return needed


def _likely_clients(demand: Demand, times: Times) -> int:
    """Studies under way at once: Little's law, and twice the spread of a count of that mean above it."""
    mean = demand.studies_per_hour / _SECONDS_AN_HOUR * times.mean_s
    return max(1, math.ceil(mean + 2 * math.sqrt(mean)))


def _memory(demand: Demand, replica: Replica, sending: Sending, requests: int) -> Memory:
    chunk = sending.slices_per_chunk(demand)
    computing = math.ceil(replica.instances * replica.max_batch / chunk)
    return Memory(
        base_bytes=SERVER_BASE_BYTES,
        request_bytes=chunk * (demand.message_bytes + slice_bytes(contract.IMAGE) + demand.answer_bytes),
        requests=requests,
        queue_requests=replica.max_queue_requests + computing,
        aggregator_bytes=replica.max_studies * (demand.slices_per_study + STUDY_ENTRY_BYTES),
        stage_shm_bytes=_stage_shm_bytes(demand, replica, chunk),
        client_shm_bytes=sending.ring_bytes(demand),
    )


def _stage_shm_bytes(demand: Demand, replica: Replica, chunk: int) -> int:
    """Regions of the Python stages: the aggregator, which a fold sends a whole study; the embedded networks too."""
    batches = [(contract.SCAN_AGGREGATOR, demand.slices_per_study)]
    if not replica.on_gpu:
        batches += [(contract.PREPROCESS, chunk), (contract.UNET, replica.instances * replica.max_batch)]
    return sum(
        STAGE_REGION_BYTES
        + BATCHES_IN_REGION
        * slices
        * sum(slice_bytes(tensor, demand.rows, demand.columns) for tensor in (*spec.inputs, *spec.outputs))
        for spec, slices in batches
    )


def _traffic(demand: Demand, replica: Replica, replicas: int) -> Traffic:
    paces = (replica.slices_per_s, demand.slices_per_s, replica.slices_per_s * replicas)
    (replica_in, load_in, peak_in), (replica_out, load_out, peak_out) = (
        tuple(pace * size for pace in paces) for size in (demand.message_bytes, demand.answer_bytes)
    )
    return Traffic(replica_in, replica_out, load_in, load_out, peak_in, peak_out)


def _require(name: str, value: int, least: int, most: int | None = None) -> None:
    if value < least or (most is not None and value > most):
        raise SettingError(f"{name} {value}: expected {least} {'or more' if most is None else f'to {most}'}")


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:  # a NaN is neither
        raise SettingError(f"{name} {value:g}: expected a number above 0")
