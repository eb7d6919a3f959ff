"""The capacity model: what it promises for any load, and its sizes held against the code that they describe."""

import math
import secrets
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import serialize_byte_tensor

from groundglass.capacity import (
    STUDY_ENTRY_BYTES,
    Demand,
    Replica,
    Sending,
    plan_capacity,
    study_times,
)
from groundglass.contract import IMAGE_SIDE, MAX_BATCH
from groundglass.errors import SettingError
from groundglass.study import SliceSource
from groundglass_client.chunk import Chunk, plan_chunks
from groundglass_client.requests import scan_request
from groundglass_client.settings import DEFAULT_SETTINGS, SENT_CHUNK_BYTES, SHARED_CHUNK_BYTES
from groundglass_ensemble.study_table import SliceRows, StudyTable, TableSettings

REPLICA = Replica(slices_per_s=100.0, on_gpu=True, instances=1, max_batch=64, max_queue_requests=128, max_studies=1000)
SENDING = Sending(SENT_CHUNK_BYTES, SHARED_CHUNK_BYTES, DEFAULT_SETTINGS.window, DEFAULT_SETTINGS.ahead)

loads = st.floats(0.1, 1e4)
demands = st.builds(
    Demand,
    studies_per_hour=loads,
    slices_per_study=st.integers(1, 4000),
    utilisation=st.floats(0.05, 0.95),
    spare=st.integers(0, 3),
)
sendings = st.builds(
    Sending, st.integers(1, 64 << 20), st.just(SHARED_CHUNK_BYTES), st.integers(1, 32), st.integers(0, 4)
)


@given(demands, sendings, st.floats(1, 10))
def test_more_studies_never_need_fewer_replicas(demand: Demand, sending: Sending, times: float) -> None:
    """A larger load needs as many replicas or more, and its studies wait as long or longer on the same ones."""
    more = replace(demand, studies_per_hour=demand.studies_per_hour * times)
    less_planned, planned = plan_capacity(demand, REPLICA, sending), plan_capacity(more, REPLICA, sending)
    assert planned.needed >= less_planned.needed
    on_same = study_times(more, REPLICA, sending, less_planned.needed)
    assert on_same.mean_s >= less_planned.times.mean_s
    assert on_same.most_s >= less_planned.times.most_s


@given(demands, sendings, st.floats(1, 10))
def test_a_faster_replica_never_needs_more_of_them(demand: Demand, sending: Sending, times: float) -> None:
    """Replicas with a higher pace meet the same load in no larger number."""
    faster = replace(REPLICA, slices_per_s=REPLICA.slices_per_s * times)
    assert plan_capacity(demand, faster, sending).needed <= plan_capacity(demand, REPLICA, sending).needed


@given(demands, sendings)
def test_the_load_stays_within_the_utilisation_and_one_replica_less_would_not(demand: Demand, sending: Sending) -> None:
    """Without a deadline the number of replicas is the smallest that keeps the headroom; spares come on top."""
    planned = plan_capacity(demand, REPLICA, sending)
    assert planned.times.load <= demand.utilisation * (1 + 1e-9)
    assert planned.replicas == planned.gpus == planned.needed + demand.spare
    fewer = planned.needed - 1
    assert fewer == 0 or study_times(demand, REPLICA, sending, fewer).load > demand.utilisation


@given(demands, sendings, st.floats(1, 3), st.floats(1, 3))
def test_a_deadline_is_kept_by_the_smallest_number_that_keeps_it(
    demand: Demand, sending: Sending, slack: float, more: float
) -> None:
    """A deadline that can be met is met, a longer one needs no more replicas, and one replica less misses it."""
    best_s = study_times(replace(demand, studies_per_hour=1e-6), REPLICA, sending, 10_000).alone_s
    hasty, patient = (replace(demand, deadline_s=best_s * factor) for factor in (slack, slack * more))
    planned = plan_capacity(hasty, REPLICA, sending)
    assert planned.times.most_s <= hasty.deadline_s
    assert plan_capacity(patient, REPLICA, sending).needed <= planned.needed
    if planned.needed > plan_capacity(demand, REPLICA, sending).needed:
        assert study_times(demand, REPLICA, sending, planned.needed - 1).most_s > hasty.deadline_s


@given(st.floats(0.01, 0.99))
def test_one_place_is_the_exact_queue(load: float) -> None:
    """On one replica a study takes 1 / (1 - load) times as long as alone, as processor sharing gives it exactly."""
    demand = Demand(studies_per_hour=load * 3600 * REPLICA.slices_per_s / 1000)
    times = study_times(demand, REPLICA, SENDING, 1)
    assert times.alone_s == pytest.approx(10)
    assert times.mean_s == pytest.approx(10 / (1 - load))


def test_a_load_beyond_the_pace_never_ends() -> None:
    """Replicas that are given more than they can do have no mean time."""
    assert study_times(Demand(studies_per_hour=360), REPLICA, SENDING, 1).mean_s == math.inf


def test_a_study_spreads_over_as_many_replicas_as_its_window_keeps_busy() -> None:
    """With the client's window two replicas halve a study's time and a third does not help; one chunk can't spread."""
    demand = Demand(studies_per_hour=1)
    assert [study_times(demand, REPLICA, SENDING, count).spread for count in (1, 2, 3)] == [1, 2, 2]
    assert study_times(replace(demand, slices_per_study=8), REPLICA, SENDING, 3).spread == 1


def test_a_deadline_below_a_study_alone_is_refused_with_the_figure() -> None:
    """What no number of replicas can do is refused, with the time that can be had."""
    with pytest.raises(SettingError, match=r"takes 5 s .* window of 4 .* 2 of them"):
        plan_capacity(Demand(studies_per_hour=1, deadline_s=4.9), REPLICA, SENDING)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"studies_per_hour": 0.0}, "studies per hour"),
        ({"studies_per_hour": math.nan}, "studies per hour"),
        ({"slices_per_study": 0}, "slices per study"),
        ({"slices_per_study": 65_537}, "65536"),
        ({"rows": 0}, "rows"),
        ({"deadline_s": -1.0}, "deadline"),
        ({"clients": 0}, "clients"),
        ({"utilisation": 1.0}, "utilisation"),
        ({"spare": -1}, "spare"),
    ],
)
def test_an_impossible_demand_is_refused_by_name(changed: dict[str, float], words: str) -> None:
    """A value that no deployment has is refused, and the error names it."""
    with pytest.raises(SettingError, match=words):
        Demand(**{"studies_per_hour": 1.0, **changed})  # type: ignore[arg-type]


@given(st.integers(1, 1024), st.integers(1, 1024), st.integers(1, 64 << 20))
def test_a_chunk_is_as_large_as_the_client_makes_it(rows: int, columns: int, chunk_bytes: int) -> None:
    """The model's slices a request are those of the client's plan."""
    sources = [SliceSource(index, Path(), "", 0, rows, columns, None) for index in range(MAX_BATCH)]
    first = next(plan_chunks(sources, chunk_bytes))
    demand = Demand(studies_per_hour=1, rows=rows, columns=columns)
    assert Sending(chunk_bytes, chunk_bytes, 4, 2).slices_per_chunk(demand) == len(first)


def test_a_slice_is_as_large_as_its_request() -> None:
    """The model's bytes of a slice are those of the tensors that a client sends."""
    hu = np.zeros((3, IMAGE_SIDE, IMAGE_SIDE), np.int16)
    request = scan_request(Chunk(np.arange(3, dtype=np.int32), hu), secrets.token_hex(16), 3, masks=True)
    sent = sum(
        len(serialize_byte_tensor(tensor).item()) if tensor.dtype == np.object_ else tensor.nbytes
        for tensor in request.tensors.values()
    )
    assert 3 * Demand(studies_per_hour=1).message_bytes == sent


@pytest.mark.parametrize("slice_count", [1, 1000])
def test_the_aggregator_keeps_no_more_of_a_study_than_predicted(slice_count: int) -> None:
    """A study costs the table a byte a slice and less than the allowance for its entry."""
    table = StudyTable(TableSettings())
    keys = [secrets.token_hex(16).encode() for _ in range(200)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for key in keys:
            table.answer(SliceRows([key], np.array([0]), np.array([slice_count]), np.array([True])))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert slice_count * len(keys) <= taken <= (slice_count + STUDY_ENTRY_BYTES) * len(keys)
