"""Readiness that means something: an inference through the whole ensemble, not only an open port."""

from __future__ import annotations

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from groundglass.contract import CT_SCAN, HU, PROBE_STUDY, SLICE_COUNT, SLICE_INDEX, SLICE_POSITIVE, STUDY

_PROBE_SIDE = 64


def is_ready(address: str, timeout_s: float) -> bool:
    """Whether the server at ``address`` answers, and infers if it serves ``ct_scan``. A refusal is False."""
    try:
        with triton.InferenceServerClient(address) as client:
            if not client.is_server_ready(client_timeout=timeout_s):
                return False
            # Not by the repository's index, which may be behind a key (--grpc-restricted-protocol).
            if not client.is_model_ready(CT_SCAN.name, client_timeout=timeout_s):
                return True
            probe_inference(client, timeout_s)
    except InferenceServerException:
        return False
    return True


def probe_inference(client: triton.InferenceServerClient, timeout_s: float, model: str = CT_SCAN.name) -> None:
    """Send one empty slice through ``model``, ``ct_scan`` or one of its kind.

    Raises InferenceServerException when the server can't do it.
    """
    values = {
        HU.name: np.full((1, _PROBE_SIDE, _PROBE_SIDE), -1000, dtype=np.int16),
        STUDY.name: np.array([[PROBE_STUDY]], dtype=np.object_),
        SLICE_INDEX.name: np.zeros((1, 1), dtype=np.int32),
        SLICE_COUNT.name: np.ones((1, 1), dtype=np.int32),
    }
    inputs = []
    for name, value in values.items():
        tensor = triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
        inputs.append(tensor.set_data_from_numpy(value))
    wanted = [triton.InferRequestedOutput(SLICE_POSITIVE.name)]
    client.infer(model, inputs, outputs=wanted, client_timeout=timeout_s)
