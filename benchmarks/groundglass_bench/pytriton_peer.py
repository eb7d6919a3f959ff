"""A peer: preprocess, network and fold as one Python function that nvidia-pytriton binds to a server of its own.

It is the shortest way to serve a model from Python, in a process of its own: run as
``python -m groundglass_bench.pytriton_peer GRPC_PORT HTTP_PORT METRICS_PORT PREPROCESS_FILE WORKSPACE``. It prints a
line once it serves, and ends when its standard input is closed.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from groundglass import contract
from groundglass.errors import GroundglassError
from groundglass.finding import ScanRows
from groundglass_ensemble.wheel import find_wheel, server_environment

MODEL: Final = "ct_scan_function"
READY: Final = "ready"
_LOOPBACK: Final = "127.0.0.1"
_STOP_S: Final = 20.0
_TYPES: Final = {"INT16": np.int16, "INT32": np.int32, "UINT8": np.uint8, "BOOL": np.bool_, "BYTES": bytes}


@contextmanager
def pytriton_server(preprocess: Path) -> Iterator[str]:
    """Its gRPC address, as long as the block lasts. Raises GroundglassError when it does not start."""
    with tempfile.TemporaryDirectory(prefix="groundglass-pytriton-", ignore_cleanup_errors=True) as folder:
        grpc_port, *others = free_ports(3)
        log = Path(folder) / "log"
        workspace = Path(folder) / "workspace"
        command = [sys.executable, "-m", __name__, *map(str, (grpc_port, *others, preprocess.absolute(), workspace))]
        with log.open("wb") as written:
            process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=written,
                env=server_environment(find_wheel()),  # else a stage takes the system's libpython, of another version
                start_new_session=True,
                text=True,
            )
        try:
            _await_ready(process, log)
            yield f"{_LOOPBACK}:{grpc_port}"
        finally:
            _end(process)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now."""
    with ExitStack() as stack:
        bound = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in bound:
            one.bind((_LOOPBACK, 0))
        return [one.getsockname()[1] for one in bound]


def _await_ready(process: subprocess.Popen[str], log: Path) -> None:
    for line in process.stdout or ():  # other libraries print there too
        if line.strip() == READY:
            return
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reasons = [line for line in lines if re.match(r"\S*(Error|Exception)\b", line)]
    raise GroundglassError(f"pytriton did not start: {[*(lines or ['it said nothing']), *reasons][-1]}")


def _end(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        pass  # what follows ends it by force
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class ScanFunction:
    """The whole flow as a function of numpy arrays."""

    def __init__(self, preprocess: Path) -> None:
        import onnxruntime

        from groundglass_bench.networks import near_free_unet

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._preprocess = onnxruntime.InferenceSession(str(preprocess), options)
        self._unet = onnxruntime.InferenceSession(near_free_unet().SerializeToString(), options)
        self._scans: dict[bytes, ScanRows] = {}
        self._lock = threading.Lock()

    def __call__(self, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Rows of ``ct_scan``'s inputs -> rows of its outputs."""
        (image,) = self._preprocess.run([contract.IMAGE.name], {contract.HU.name: inputs[contract.HU.name]})
        names = [spec.name for spec in contract.UNET.outputs]
        found = dict(zip(names, self._unet.run(names, {contract.IMAGE.name: image}), strict=True))
        return found | self._fold(inputs, found[contract.SLICE_POSITIVE.name])

    def _fold(self, inputs: dict[str, NDArray[Any]], positive: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
        keys, counts, indices = (
            inputs[spec.name][:, 0] for spec in (contract.STUDY, contract.SLICE_COUNT, contract.SLICE_INDEX)
        )
        with self._lock:
            for key in set(keys.tolist()):
                rows = keys == key
                scan = self._scans.setdefault(key, ScanRows(int(counts[rows][0])))
                scan.check(indices[rows], positive[rows, 0])
                scan.add(indices[rows], positive[rows, 0])
            findings = [self._scans[key].finding() for key in keys.tolist()]
        return {
            contract.LONGEST_RUN.name: np.array([[found.longest_run] for found in findings], np.int32),
            contract.SLICES_SEEN.name: np.array([[found.slices_seen] for found in findings], np.int32),
            contract.SCAN_COMPLETE.name: np.array([[found.complete] for found in findings]),
            contract.SCAN_POSITIVE.name: np.array([[found.positive] for found in findings]),
        }


def serve(ports: tuple[int, int, int], preprocess: Path, workspace: Path) -> None:
    """Serve until standard input is closed."""
    from pytriton.decorators import batch
    from pytriton.model_config import ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    def tensors(specs: tuple[contract.TensorSpec, ...]) -> list[Any]:
        return [Tensor(name=spec.name, dtype=_TYPES[spec.datatype], shape=spec.dims) for spec in specs]

    config = TritonConfig(
        grpc_address=_LOOPBACK,
        grpc_port=ports[0],
        http_address=_LOOPBACK,
        http_port=ports[1],
        metrics_address=_LOOPBACK,
        metrics_port=ports[2],
    )
    function = ScanFunction(preprocess)
    with Triton(config=config, workspace=workspace) as triton:
        triton.bind(
            model_name=MODEL,
            infer_func=batch(lambda **inputs: function(**inputs)),
            inputs=tensors(contract.CT_SCAN.inputs),
            outputs=tensors(contract.CT_SCAN.outputs),
            config=ModelConfig(max_batch_size=contract.MAX_BATCH),
        )
        triton.run()
        print(READY, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    serve((int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), Path(sys.argv[4]), Path(sys.argv[5]))
