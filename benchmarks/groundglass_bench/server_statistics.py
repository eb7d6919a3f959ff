"""Where a server spends its time, from the counters that Triton keeps of each model.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from groundglass import contract
from groundglass.errors import ServerError
from groundglass_bench.result import Table

_NS_PER_MS: Final = 1e6
_TIMEOUT_S: Final = 10.0
_PAUSE_S: Final = 0.05
_READINGS: Final = 20


@dataclass(frozen=True, slots=True)
class ModelTimes:
    """What one model did since some moment: slices, executions, and milliseconds summed over its requests.

    Of an ensemble the compute times are those of its steps together. Requests wait and run side by side, so the sums
    may exceed the time that has passed.
    """

    slices: int
    executions: int
    queue_ms: float
    input_ms: float
    infer_ms: float
    output_ms: float

    def since(self, before: ModelTimes) -> ModelTimes:
        """The difference. Raises ServerError when a counter fell, which is when the server started anew."""
        change = {field.name: getattr(self, field.name) - getattr(before, field.name) for field in fields(ModelTimes)}
        if min(change.values()) < 0:
            raise ServerError("the server's counters fell: it was restarted in the middle of a measurement")
        return ModelTimes(**change)


ServerTimes = Mapping[str, ModelTimes]
"""By model."""


def read_statistics(address: str) -> ServerTimes:
    """The counters of the models of the flow, all their versions together. Raises ServerError when there are none.

    Triton counts a request just after it has answered it: the counters are read until they stay, for a second at most.
    """
    try:
        with triton.InferenceServerClient(address) as client:
            found = _read(client)
            for _ in range(_READINGS):
                time.sleep(_PAUSE_S)
                before, found = found, _read(client)
                if found == before:
                    break
    except InferenceServerException as error:
        raise ServerError(f"{address} gave no statistics: {error.message()}") from error
    return found


def difference(before: ServerTimes, after: ServerTimes) -> ServerTimes:
    """What each model did in between."""
    return {name: times.since(before[name]) for name, times in after.items()}


def stage_table(times: ServerTimes) -> Table:
    """Milliseconds a slice in each model: waiting, taking tensors in, computing, handing them on."""
    rows = []
    for name, found in times.items():
        slices = max(1, found.slices)
        spent = (found.queue_ms, found.input_ms, found.infer_ms, found.output_ms)
        batch = found.slices / found.executions if found.executions else 0.0
        rows.append((name, found.slices, round(batch, 1), *(round(ms / slices, 3) for ms in spent)))
    return Table(
        "Server, ms a slice",
        ("model", "slices", "slices an execution", "queue", "input", "infer", "output"),
        tuple(rows),
    )


def _read(client: triton.InferenceServerClient) -> ServerTimes:
    statistics = client.get_inference_statistics(client_timeout=_TIMEOUT_S)
    entries: dict[str, list[Any]] = {spec.name: [] for spec in contract.MODELS}
    for entry in statistics.model_stats:
        if entry.name in entries:
            entries[entry.name].append(entry)
    return {name: _times(found) for name, found in entries.items()}


def _times(entries: list[Any]) -> ModelTimes:
    def total_ms(part: str) -> float:
        nanoseconds: int = sum(getattr(entry.inference_stats, part).ns for entry in entries)
        return nanoseconds / _NS_PER_MS

    return ModelTimes(
        slices=sum(entry.inference_count for entry in entries),
        executions=sum(entry.execution_count for entry in entries),
        queue_ms=total_ms("queue"),
        input_ms=total_ms("compute_input"),
        infer_ms=total_ms("compute_infer"),
        output_ms=total_ms("compute_output"),
    )
