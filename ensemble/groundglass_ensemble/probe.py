"""Readiness that means something: an inference through the whole ensemble, not only an open port.

As a program it is what health checks call: ``python3 -m groundglass_ensemble.probe [HOST:PORT]``. It exits with 0 when
the inference was answered, else with 1 and one line. It needs numpy and tritonclient alone, as the server's image has.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from groundglass.contract import (
    CT_SCAN,
    HU,
    PROBE_STUDY,
    SCAN_AGGREGATOR,
    SLICE_COUNT,
    SLICE_INDEX,
    SLICE_POSITIVE,
    STUDY,
)

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
    """Send one empty slice through ``model``: ``ct_scan``, one of its kind, or ``scan_aggregator`` alone.

    Raises InferenceServerException when the server can't do it.
    """
    values = {
        STUDY.name: np.array([[PROBE_STUDY]], dtype=np.object_),
        SLICE_INDEX.name: np.zeros((1, 1), dtype=np.int32),
        SLICE_COUNT.name: np.ones((1, 1), dtype=np.int32),
    }
    if model == SCAN_AGGREGATOR.name:
        values[SLICE_POSITIVE.name] = np.zeros((1, 1), dtype=np.bool_)
    else:
        values[HU.name] = np.full((1, _PROBE_SIDE, _PROBE_SIDE), -1000, dtype=np.int16)
    inputs = []
    for name, value in values.items():
        tensor = triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
        inputs.append(tensor.set_data_from_numpy(value))
    wanted = [triton.InferRequestedOutput(SLICE_POSITIVE.name)]
    client.infer(model, inputs, outputs=wanted, client_timeout=timeout_s)


def main(arguments: Sequence[str]) -> int:
    """Probe once. Returns the exit code, 0 for an answered inference."""
    given = _parser().parse_args(arguments)
    with triton.InferenceServerClient(given.address) as client:
        try:
            probe_inference(client, given.timeout_s, given.model)
            return 0
        except InferenceServerException as error:
            said = " ".join(str(error.message()).split())
        print(f"{given.address} does not infer through {given.model}: {said}", file=sys.stderr)
        if given.end_broken is not None and _is_broken(client, given.timeout_s):
            os.kill(given.end_broken, signal.SIGTERM)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="groundglass_ensemble.probe", description="Exit with 0 if Triton infers.")
    parser.add_argument("address", nargs="?", default="localhost:8001", metavar="HOST:PORT", help="its gRPC endpoint")
    parser.add_argument(
        "--model",
        choices=[CT_SCAN.name, SCAN_AGGREGATOR.name],
        default=CT_SCAN.name,
        help="ct_scan is the whole flow; scan_aggregator its last stage alone, which never waits behind the network",
    )
    parser.add_argument("--timeout-s", type=float, default=10.0, help="longest wait for an answer, seconds")
    parser.add_argument(
        "--end-broken",
        type=int,
        metavar="PID",
        help="tell this process to end when the server lives and its last stage, a process of its own, doesn't: Triton "
        "leaves a dead one dead, and Docker restarts what has ended, never what is unhealthy",
    )
    return parser


def _is_broken(client: triton.InferenceServerClient, timeout_s: float) -> bool:
    """Whether the server is there and its last stage is not. One that is starting, gone or busy is not broken."""
    try:
        probe_inference(client, timeout_s, SCAN_AGGREGATOR.name)
    except InferenceServerException:
        try:
            return bool(client.is_server_live(client_timeout=timeout_s))
        except InferenceServerException:
            return False
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
