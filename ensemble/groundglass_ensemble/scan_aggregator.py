"""The last stage of ``ct_scan``, as Triton's Python backend calls it: slice verdicts in, scan findings out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from groundglass import contract
from groundglass.errors import AggregationError
from groundglass.finding import ScanFinding
from groundglass_ensemble.study_table import REASONS, STATES, VERDICTS, SliceRows, StudyTable, TableSettings


class TritonPythonModel:
    """The study table behind one model instance. Neither its log nor its metrics ever hold a study's key."""

    def initialize(self, args: dict[str, str]) -> None:
        """Build the table from the config's parameters. Raises SettingError, failing the load, for an unusable one."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self._table = StudyTable(TableSettings.from_parameters(parameters))
        self._metrics = _Metrics()
        self._broken = False

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request; one that contradicts its study is refused alone, and changes nothing."""
        responses = [self._respond(request) for request in requests]
        self._metrics.report(self._table)
        return responses

    def is_ready(self) -> bool:
        """Whether the table can be trusted. Newer servers ask; the embedded one (2.51) never does."""
        return not self._broken

    def _respond(self, request: Any) -> Any:
        try:
            rows, positives = _read(request)
            return _write(self._table.answer(rows), positives)
        except AggregationError as error:
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception:
            self._broken = True  # a fault of ours: the table may be half changed
            raise


class _Metrics:
    """Triton's custom metrics. Each call crosses into the server's process, so only changes are sent."""

    def __init__(self) -> None:
        self._scans = _family("COUNTER", "groundglass_scans_total", "Scans whose last slice was seen, by verdict")
        self._dropped = _family(
            "COUNTER",
            "groundglass_dropped_studies_total",
            "Studies forgotten, by reason (idle, capacity) and by whether all their slices had been seen",
        )
        self._open = _family(
            "GAUGE", "groundglass_open_studies", "Studies kept whose slices were not all seen yet, at the last request"
        )
        # All labels exist from the start: a counter that appears with its first event hides that event from rate().
        self._finished = {verdict: self._scans.Metric(labels={"verdict": verdict}) for verdict in VERDICTS}
        self._forgotten = {
            (reason, state): self._dropped.Metric(labels={"reason": reason, "state": state})
            for reason in REASONS
            for state in STATES
        }
        self._open_studies = self._open.Metric(labels={})
        self._sent: Counter[object] = Counter()

    def report(self, table: StudyTable) -> None:
        """Send what changed since the last call."""
        counters: list[tuple[Any, object, int]] = [
            (metric, verdict, table.finished[verdict]) for verdict, metric in self._finished.items()
        ]
        counters += [(metric, cause, table.dropped[cause]) for cause, metric in self._forgotten.items()]
        for metric, label, count in counters:
            if count != self._sent[label]:
                metric.increment(count - self._sent[label])
                self._sent[label] = count
        if table.open_studies != self._sent["open"]:
            self._open_studies.set(table.open_studies)
            self._sent["open"] = table.open_studies


def _family(kind: str, name: str, description: str) -> Any:
    return pb_utils.MetricFamily(name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind))


def _read(request: Any) -> tuple[SliceRows, NDArray[np.bool_]]:
    """The rows of a request, and the verdicts as they came, bool (n, 1)."""

    def tensor(spec: contract.TensorSpec) -> NDArray[Any]:
        array: NDArray[Any] = pb_utils.get_input_tensor_by_name(request, spec.name).as_numpy()
        return array

    positives = tensor(contract.SLICE_POSITIVE)
    rows = SliceRows(
        studies=tensor(contract.STUDY).ravel().tolist(),
        indices=tensor(contract.SLICE_INDEX).ravel(),
        counts=tensor(contract.SLICE_COUNT).ravel(),
        positives=positives.ravel(),
    )
    return rows, positives


def _write(findings: list[ScanFinding], positives: NDArray[np.bool_]) -> Any:
    columns = (
        (contract.LONGEST_RUN, [finding.longest_run for finding in findings], np.int32),
        (contract.SLICES_SEEN, [finding.slices_seen for finding in findings], np.int32),
        (contract.SCAN_COMPLETE, [finding.complete for finding in findings], np.bool_),
        (contract.SCAN_POSITIVE, [finding.positive for finding in findings], np.bool_),
    )
    outputs = [pb_utils.Tensor(contract.SLICE_POSITIVE.name, positives)]
    outputs += [pb_utils.Tensor(spec.name, np.array(values, dtype=kind)[:, None]) for spec, values, kind in columns]
    return pb_utils.InferenceResponse(outputs)
