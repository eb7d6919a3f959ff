"""Requests to the served models and their answers, as values: the client's only knowledge of tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundglass import contract
from groundglass.contract import ModelSpec, TensorSpec
from groundglass.errors import ServerRefused
from groundglass.finding import ScanFinding
from groundglass_client.buffers import Buffer
from groundglass_client.chunk import Chunk

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Request:
    """One inference request: the tensors that go to a model, and the names of those wanted back.

    ``buffer`` is given where its ``HU`` tensor lies at the start of that buffer, and the masks may go to its end.
    ``live`` is the version of ``unet`` that the sender takes to be live; None where any may answer. ``traceparent`` is
    the span that it belongs to, as W3C Trace Context writes it; None where nothing is traced.
    """

    model: ModelSpec
    tensors: Tensors
    outputs: tuple[TensorSpec, ...]
    buffer: Buffer | None = None
    live: str | None = None
    traceparent: str | None = None

    @property
    def pin(self) -> str | None:
        """The version of ``unet`` that is asked for by name; None for a model that whichever is live answers."""
        name = self.model.name
        return name.removeprefix(contract.PIN_PREFIX) if name.startswith(contract.PIN_PREFIX) else None


@dataclass(frozen=True, slots=True)
class ChunkAnswer:
    """What ``ct_scan`` said of one chunk, row by row.

    ``indices`` int32 (n,), ``lesion_pixels`` int32 (n,), ``positive`` bool (n,), ``masks`` uint8 (n, 512, 64)
    bit-packed or None when not asked for. ``finding`` is the scan as the server knew it after these rows.
    """

    indices: NDArray[np.int32]
    lesion_pixels: NDArray[np.int32]
    positive: NDArray[np.bool_]
    masks: NDArray[np.uint8] | None
    finding: ScanFinding


def scan_request(
    chunk: Chunk,
    study_key: str,
    slice_count: int,
    *,
    masks: bool,
    buffer: Buffer | None = None,
    model: ModelSpec = contract.CT_SCAN,
    live: str | None = None,
) -> Request:
    """The request that sends ``chunk`` through the whole ensemble; its pixels start ``buffer``, if that is given.

    ``model`` is ``ct_scan`` or one that asks for a version by name; for ``live`` see :class:`Request`.
    """
    rows = len(chunk.indices)
    tensors = {contract.HU.name: chunk.hu, **_row_tensors(study_key, chunk.indices, slice_count, rows)}
    wanted = tuple(spec for spec in model.outputs if masks or spec is not contract.MASK)
    return Request(model, tensors, wanted, buffer, live)


def fold_request(positive: NDArray[np.bool_], study_key: str) -> Request:
    """The request that folds the slice verdicts of a whole scan, bool (n,), on any replica: no pixels, a few bytes a
    slice.
    """
    rows = len(positive)
    indices = np.arange(rows, dtype=np.int32)
    tensors = {
        **_row_tensors(study_key, indices, rows, rows),
        contract.SLICE_POSITIVE.name: positive.reshape(rows, 1),
    }
    return Request(contract.SCAN_AGGREGATOR, tensors, contract.SCAN_AGGREGATOR.outputs)


def read_scan_answer(chunk: Chunk, slice_count: int, answer: Tensors) -> ChunkAnswer:
    """The values in ``ct_scan``'s answer to ``chunk``. Raises ServerRefused when a tensor is missing or misshapen."""
    rows = len(chunk.indices)
    return ChunkAnswer(
        indices=chunk.indices,
        lesion_pixels=_column(answer, contract.LESION_PIXELS, rows).astype(np.int32, copy=False),
        positive=_column(answer, contract.SLICE_POSITIVE, rows).astype(np.bool_, copy=False),
        masks=_masks(answer, rows),
        finding=read_finding(answer, slice_count, rows),
    )


def read_finding(answer: Tensors, slice_count: int, rows: int) -> ScanFinding:
    """The scan verdict in an answer of ``rows`` rows. Raises ServerRefused when a tensor is missing or misshapen.

    Every row of one study answers with the same finding, that of the study after all rows of its request.
    """
    return ScanFinding(
        slice_count=slice_count,
        slices_seen=int(_column(answer, contract.SLICES_SEEN, rows)[-1]),
        longest_run=int(_column(answer, contract.LONGEST_RUN, rows)[-1]),
        positive=bool(_column(answer, contract.SCAN_POSITIVE, rows)[-1]),
    )


def _row_tensors(study_key: str, indices: NDArray[np.int32], slice_count: int, rows: int) -> Tensors:
    return {
        contract.STUDY.name: np.full((rows, 1), study_key.encode(), dtype=np.object_),
        contract.SLICE_INDEX.name: indices.reshape(rows, 1),
        contract.SLICE_COUNT.name: np.full((rows, 1), slice_count, dtype=np.int32),
    }


def _masks(answer: Tensors, rows: int) -> NDArray[np.uint8] | None:
    if contract.MASK.name not in answer:
        return None
    return _checked(answer, contract.MASK, rows).astype(np.uint8, copy=False)


def _column(answer: Tensors, spec: TensorSpec, rows: int) -> NDArray[Any]:
    return _checked(answer, spec, rows)[:, 0]


def _checked(answer: Tensors, spec: TensorSpec, rows: int) -> NDArray[Any]:
    tensor = answer.get(spec.name)
    shape = (rows, *spec.dims)
    if tensor is None or tensor.shape != shape:
        found = "no such tensor" if tensor is None else f"shape {tensor.shape}"
        raise ServerRefused(
            f"the server's answer holds {found} for {spec.name}, expected {shape}: is it another ct_scan?"
        )
    return tensor
