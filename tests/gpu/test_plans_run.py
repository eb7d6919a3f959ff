"""Plans on a real GPU: the stand-in's runner and the parity gate's engine, under the TensorRT runtime that is there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import probe_network
from calls import infer
from groundglass.contract import IMAGE_SIDE
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from groundglass_export.engine import OnnxEngine
from groundglass_export.plan_engine import PlanEngine
from plan_doubles import assembled_modules

pytestmark = pytest.mark.gpu

MAX_BATCH = 8
CONFIG = """
backend: "tensorrt"
default_model_filename: "model.plan"
max_batch_size: 8
input [ { name: "IN" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "DOUBLE" data_type: TYPE_FP32 dims: [ 4 ] } ]
instance_group [ { count: 1 kind: KIND_GPU } ]
dynamic_batching { max_queue_delay_microseconds: 200000 }
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The stand-in's modules, its CUDA bindings and the installed runtime; skips without a GPU."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    bindings = pytest.importorskip("cuda.bindings.runtime")
    with assembled_modules(tmp_path_factory.mktemp("assembled")) as modules:
        runtimes = dict(modules.plan_file.installed_runtimes())
        if not runtimes:
            pytest.skip("no TensorRT runtime is installed")
        modules.runtime = next(iter(runtimes.values()))
        modules.bindings = bindings
        yield modules


def doubling() -> onnx.ModelProto:
    """IN float32 (n, 4) -> DOUBLE (n, 4), SUM (n, 1)."""
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["IN", "IN"], ["DOUBLE"]),
            helper.make_node("ReduceSum", ["IN", "axis"], ["SUM"], keepdims=1),
        ],
        "doubling",
        [helper.make_tensor_value_info("IN", TensorProto.FLOAT, ["n", 4])],
        [
            helper.make_tensor_value_info("DOUBLE", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("SUM", TensorProto.FLOAT, ["n", 1]),
        ],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [1])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def built(runtime: Any, model: onnx.ModelProto, name: str, sizes: tuple[int, ...]) -> bytes:
    """A plan of the installed runtime, for batches of 1 to 8."""
    logger = runtime.Logger(runtime.Logger.ERROR)
    builder = runtime.Builder(logger)
    flags = getattr(runtime, "NetworkDefinitionCreationFlag", None)
    strong = getattr(flags, "STRONGLY_TYPED", None)
    network = builder.create_network(1 << int(strong) if strong is not None else 0)
    parser = runtime.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString())
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape(name, (1, *sizes), (4, *sizes), (MAX_BATCH, *sizes))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


def test_batches_graphs_and_refusals_on_a_real_gpu(parts: SimpleNamespace) -> None:
    """Requests get their own rows from plain runs, recorded runs and replays; a batch too large is refused."""
    plan = parts.plan_file.open_plan(parts.runtime, built(parts.runtime, doubling(), "IN", (4,)))
    runner = parts.plan_runner.PlanRunner(plan, parts.cuda_memory.Cuda(parts.bindings, 0), max_graphs=2)
    rng = np.random.default_rng(0)
    try:
        for sizes in [(1,), (2, 3), (8,), (5,), (1, 1, 3), (8,), (1,), (7,), (2, 3), (8,), (1,)] * 3:
            feeds = [{"IN": rng.integers(0, 100, (size, 4)).astype(np.float32)} for size in sizes]
            for feed, (doubles, sums) in zip(feeds, runner.run(["DOUBLE", "SUM"], feeds), strict=True):
                np.testing.assert_array_equal(doubles, feed["IN"] * 2)
                np.testing.assert_array_equal(sums, feed["IN"].sum(axis=1, keepdims=True))
        with pytest.raises(ValueError, match="optimization profile"):
            runner.run(["SUM"], [{"IN": np.zeros((9, 4), np.float32)}])
    finally:
        runner.close()


def test_a_file_that_is_no_plan_is_refused_with_a_reason(parts: SimpleNamespace) -> None:
    """The runtime's own words come back."""
    with pytest.raises(parts.plan_file.PlanFailed, match=r"\w"):
        parts.plan_file.open_plan(parts.runtime, b"no plan" * 100)


def test_the_plan_engine_answers_as_onnx_runtime_does(parts: SimpleNamespace, tmp_path: Path) -> None:
    """The probe network gives the same masks, counts and verdicts as a plan and as a graph, at every batch size."""
    model = probe_network.unet()
    path = tmp_path / "model.plan"
    path.write_bytes(built(parts.runtime, model, "IMAGE", (1, IMAGE_SIDE, IMAGE_SIDE)))
    engine, reference = PlanEngine(path), OnnxEngine(model)
    images = np.random.default_rng(1).random((MAX_BATCH, 1, IMAGE_SIDE, IMAGE_SIDE), dtype=np.float32)
    images[::2] *= 0.89  # no pixel of these reaches the threshold
    for batch in (1, 3, MAX_BATCH, 3):
        found, expected = engine.answers(images[:batch]), reference.answers(images[:batch])
        np.testing.assert_array_equal(found.mask, expected.mask)
        np.testing.assert_array_equal(found.pixels, expected.pixels)
        np.testing.assert_array_equal(found.positive, expected.positive)


@pytest.mark.triton
def test_a_real_server_serves_a_plan(parts: SimpleNamespace, tmp_path: Path) -> None:
    """The embedded Triton loads a plan through the stand-in, and requests that share a batch get their own rows."""
    folder = tmp_path / "repository" / "doubling"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(CONFIG)
    (folder / "1" / "model.plan").write_bytes(built(parts.runtime, doubling(), "IN", (4,)))
    with EmbeddedTriton(ServeSettings(folder.parent)) as server, ThreadPoolExecutor(4) as pool:

        def ask(number: int) -> None:
            values = np.full((1 + number % 2, 4), number, np.float32)
            np.testing.assert_array_equal(infer(server.grpc_address, "doubling", {"IN": values})["DOUBLE"], values * 2)

        for _ in range(3):
            list(pool.map(ask, range(4)))
