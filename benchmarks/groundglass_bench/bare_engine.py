"""The bare engine: ONNX Runtime on the very file that is served, images in memory, in its fastest way on this machine.

Several ways are measured, since which is the fastest depends on the processor: a large batch may fall out of its cache,
and threads of one operator may wait for one another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

from groundglass.contract import IMAGE, UNET
from groundglass_bench.serving import BareEngine, Surroundings, newest_file
from groundglass_ensemble.repository import config_file, read_config

_LARGE_BATCH: Final = 8


def bare_ways(around: Surroundings) -> Mapping[str, BareEngine]:
    """Every way to run the served file without a server, by a name for the report."""
    config = read_config(config_file(around.repository / UNET.name, around.config_name))
    file = newest_file(around.repository, UNET.name, config.default_model_filename)
    if file.suffix == ".plan":
        return around.open_plan(file)
    threads = around.threads
    together, apart = _session(file, threads), _session(file, 1)
    return {
        f"ONNX Runtime, {threads} threads, batch 1": _rate(_run(together, 1), 1),
        f"ONNX Runtime, {threads} threads, batch {_LARGE_BATCH}": _rate(_run(together, _LARGE_BATCH), _LARGE_BATCH),
        f"ONNX Runtime, {threads} runs at once of 1 thread, batch 1": _rate(_run(apart, 1), 1, side_by_side=threads),
    }


def fastest(ways: Mapping[str, BareEngine], probe_s: float) -> tuple[str, Mapping[str, float]]:
    """The name of the fastest way, and slices a second of all, each tried for ``probe_s``."""
    rates = {name: run(probe_s) for name, run in ways.items()}
    return max(rates, key=lambda name: rates[name]), rates


def _session(file: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin after a run would take the cores from the server, whose turn it is next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _run(session: Any, batch: int) -> Callable[[], object]:
    images = np.random.default_rng(batch).random((batch, *IMAGE.dims), dtype=np.float32)
    names = [tensor.name for tensor in UNET.outputs]
    return lambda: session.run(names, {IMAGE.name: images})


def _rate(run: Callable[[], object], slices: int, side_by_side: int = 1) -> BareEngine:
    """``side_by_side`` threads that do ``run``, each a batch of ``slices``, over and over."""

    def rate(seconds: float) -> float:
        run()  # the first run of a batch size allocates
        with ThreadPoolExecutor(side_by_side) as workers:
            return slices * sum(workers.map(lambda worker: _runs_per_s(run, seconds), range(side_by_side)))

    return rate


def _runs_per_s(run: Callable[[], object], seconds: float) -> float:
    runs, start = 0, time.perf_counter()
    while True:
        run()
        runs += 1
        if (passed := time.perf_counter() - start) >= seconds:
            return runs / passed
