"""Requests to a live server, as plainly as tritonclient allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import np_to_triton_dtype

from groundglass import contract
from probe_network import slices


def infer_inputs(values: Mapping[str, NDArray[Any]]) -> list[triton.InferInput]:
    """Arrays by name as tritonclient takes them."""
    inputs = []
    for name, value in values.items():
        tensor = triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
        inputs.append(tensor.set_data_from_numpy(value))
    return inputs


def infer(
    address: str, model: str, values: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Send arrays to a model; its outputs by name, all of them unless some are asked for."""
    inputs = infer_inputs(values)
    wanted = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
    with triton.InferenceServerClient(address) as client:
        result = client.infer(model, inputs, outputs=wanted, client_timeout=30)
        return {tensor.name: result.as_numpy(tensor.name) for tensor in result.get_response().outputs}


def scan_rows(study: bytes, indices: Sequence[int], positives: Sequence[bool]) -> dict[str, NDArray[Any]]:
    """The ``ct_scan`` inputs of some slices of one scan, whose verdicts are ``positives`` by slice index."""
    rows = len(indices)
    return {
        contract.HU.name: slices([positives[index] for index in indices]),
        contract.STUDY.name: np.full((rows, 1), study, dtype=np.object_),
        contract.SLICE_INDEX.name: np.array(indices, dtype=np.int32)[:, None],
        contract.SLICE_COUNT.name: np.full((rows, 1), len(positives), dtype=np.int32),
    }
