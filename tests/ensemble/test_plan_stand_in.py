"""The TensorRT stand-in: which plans it refuses and why, and how it runs the others, on a GPU made of host memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict

import probe_network
from groundglass.contract import MAX_BATCH
from groundglass_ensemble.repository import read_config
from groundglass_ensemble.wheel import copy_stand_ins
from groundglass_export.plan import PlanSettings, build_plan
from plan_doubles import PLAN, HostContext, HostCuda, HostEngine, HostTensorRT, assembled_modules

MODELS = Path(__file__).parents[2] / "model_repository"
CONFIG: dict[str, Any] = {
    "max_batch_size": 8,
    "input": [{"name": "IN", "data_type": "TYPE_FP32", "dims": ["4"]}],
    "output": [
        {"name": "DOUBLE", "data_type": "TYPE_FP32", "dims": ["4"]},
        {"name": "SUM", "data_type": "TYPE_INT32", "dims": ["1"]},
    ],
}
TARGET = {"runtime": "tensorrt", "version": "11.4.1.9", "compute_capabilities": ["9.0"]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The modules of the stand-in, imported from a folder as the server gets it."""
    with assembled_modules(tmp_path_factory.mktemp("assembled")) as modules:
        yield modules


@pytest.fixture
def tensors(parts: SimpleNamespace) -> list[Any]:
    """Inputs and outputs of the plan, as it describes them."""
    tensor = parts.plan_checks.PlanTensor
    return [
        tensor("IN", "input", "FLOAT", (-1, 4), (1, 4), (8, 4)),
        tensor("DOUBLE", "output", "FLOAT", (-1, 4), (-1, 4), (-1, 4)),
        tensor("SUM", "output", "INT32", (-1, 1), (-1, 1), (-1, 1)),
    ]


class Running:
    """A runner, and the GPU and runtime under it."""

    def __init__(self, parts: SimpleNamespace, *, capturable: bool = True, max_graphs: int = 16) -> None:
        self.host = HostCuda()
        self.tensorrt = HostTensorRT(self.host, capturable=capturable)
        self.plan = parts.plan_file.open_plan(self.tensorrt, PLAN)
        self.runner = parts.plan_runner.PlanRunner(self.plan, parts.cuda_memory.Cuda(self.host, 0), max_graphs)

    def ask(self, *sizes: int, seed: int = 0) -> None:
        """Run requests of these sizes as one batch, and check every answer."""
        rng = np.random.default_rng(seed)
        feeds = [{"IN": rng.integers(0, 100, (size, 4)).astype(np.float32)} for size in sizes]
        answers = self.runner.run(["SUM", "DOUBLE"], feeds)
        for feed, (sums, doubles) in zip(feeds, answers, strict=True):
            np.testing.assert_array_equal(doubles, feed["IN"] * 2)
            np.testing.assert_array_equal(sums, feed["IN"].sum(axis=1, keepdims=True).astype(np.int32))


def machine(parts: SimpleNamespace, **changes: Any) -> Any:
    """A server with an H200, where one thing is different."""
    values = {"runtime": "tensorrt", "version": "11.4.1.9", "gpu": "NVIDIA H200", "capability": (9, 0)}
    return parts.plan_checks.Machine(**{**values, **changes})


def test_the_shared_modules_lie_in_every_stand_ins_folder(tmp_path: Path) -> None:
    """Each assembled folder stands alone: model.py, its own modules and the shared ones, none of them a link."""
    copy_stand_ins(tmp_path)
    shared = {"stand_in_batch.py", "stand_in_config.py", "stand_in_manifest.py", "stand_in_requests.py"}
    for name in ("onnxruntime", "tensorrt"):
        files = {file.name for file in (tmp_path / name).iterdir()}
        assert shared | {"model.py"} <= files
        assert not any(file.is_symlink() for file in (tmp_path / name).iterdir())
    assert {folder.name for folder in tmp_path.iterdir()} == {"onnxruntime", "tensorrt"}


def test_requests_of_a_batch_get_their_own_rows(parts: SimpleNamespace) -> None:
    """Requests of any sizes within the profile run as one batch, and each gets back what it sent, doubled."""
    running = Running(parts)
    for turn, sizes in enumerate([(1,), (2, 3), (8,), (1, 1, 1, 5), (2, 3), (8,), (1,), (2, 3)]):
        running.ask(*sizes, seed=turn)


def test_answers_outlive_the_next_batch(parts: SimpleNamespace) -> None:
    """A response that is not sent yet is not overwritten by the batch that runs after it."""
    running = Running(parts)
    ((first,),) = running.runner.run(["DOUBLE"], [{"IN": np.ones((2, 4), np.float32)}])
    running.runner.run(["DOUBLE"], [{"IN": np.full((2, 4), 9, np.float32)}])
    np.testing.assert_array_equal(first, np.full((2, 4), 2, np.float32))


def test_nothing_is_allocated_for_a_request(parts: SimpleNamespace) -> None:
    """Memory is taken once, when the plan is opened, whatever is asked later."""
    running = Running(parts)
    before = {name: running.host.calls[name] for name in ("cudaMalloc", "cudaMallocHost")}
    for turn in range(12):
        running.ask(1 + turn % 8, seed=turn)
    assert {name: running.host.calls[name] for name in before} == before


def test_a_shape_that_repeats_runs_as_a_graph(parts: SimpleNamespace) -> None:
    """From the third run on a batch size is one launch of its graph; the input's shape is not set again."""
    running = Running(parts)
    running.ask(4)
    assert "cudaGraphLaunch" not in running.host.calls
    running.ask(4)
    contexts = len(running.tensorrt.contexts)
    shape_calls = [context.shape_calls for context in running.tensorrt.contexts]
    for turn in range(5):
        running.ask(3, 1, seed=turn)
    assert running.host.calls["cudaGraphLaunch"] == 5
    assert [context.shape_calls for context in running.tensorrt.contexts] == shape_calls
    assert len(running.tensorrt.contexts) == contexts == 2


def test_the_shape_is_set_only_when_it_changes(parts: SimpleNamespace) -> None:
    """Without graphs, equal batches in a row set the input's shape once."""
    running = Running(parts, max_graphs=0)
    running.ask(4)
    calls = running.tensorrt.contexts[0].shape_calls
    running.ask(4)
    running.ask(2, 2)
    assert running.tensorrt.contexts[0].shape_calls == calls
    running.ask(5)
    assert running.tensorrt.contexts[0].shape_calls == calls + 1
    assert "cudaStreamBeginCapture" not in running.host.calls


def test_the_number_of_graphs_is_bounded(parts: SimpleNamespace) -> None:
    """Beyond the bound batch sizes are served without a graph, and those that have one keep it."""
    running = Running(parts, max_graphs=2)
    for turn in range(4):
        for size in range(1, 9):
            running.ask(size, seed=turn)
    assert running.host.calls["cudaGraphInstantiate"] == 2
    assert running.host.calls["cudaGraphLaunch"] == 4


def test_a_plan_that_cannot_be_captured_is_served_without_graphs(parts: SimpleNamespace) -> None:
    """A failed capture is ended, tried once for a shape, and costs no request."""
    running = Running(parts, capturable=False)
    for turn in range(4):
        running.ask(4, seed=turn)
    assert running.host.calls["cudaStreamBeginCapture"] == running.host.calls["cudaStreamEndCapture"] == 1
    assert "cudaGraphLaunch" not in running.host.calls


@pytest.mark.parametrize(
    ("feed", "words"),
    [
        ({"IN": np.zeros((9, 4), np.float32)}, r"'IN' is \[9, 4\], and the plan's optimization profile goes from"),
        ({"IN": np.zeros((1, 5), np.float32)}, r"'IN' is \[1, 5\]"),
        ({"IN": np.zeros((1, 4, 1), np.float32)}, r"'IN' is \[1, 4, 1\]"),
        ({}, "'IN' is missing"),
    ],
    ids=["batch", "size", "rank", "missing"],
)
def test_inputs_outside_the_profile_are_refused(parts: SimpleNamespace, feed: dict[str, Any], words: str) -> None:
    """What the plan can't take is an error of that request, and the next request is served."""
    running = Running(parts)
    with pytest.raises(ValueError, match=words):
        running.runner.run(["SUM"], [feed])
    running.ask(3)


def test_closing_gives_everything_back(parts: SimpleNamespace) -> None:
    """Memory, graphs and the stream are gone once the runner is closed."""
    running = Running(parts)
    for _ in range(3):
        running.ask(4)
    running.runner.close()
    assert (running.host.memory, running.host.graphs, running.host.open_streams) == ({}, {}, 0)


def test_a_file_that_is_no_plan_tells_the_runtimes_reason(parts: SimpleNamespace) -> None:
    """What the runtime wrote to its log is the reason of the refusal."""
    with pytest.raises(parts.plan_file.PlanFailed, match="Serialization assertion failed"):
        parts.plan_file.open_plan(HostTensorRT(HostCuda()), b"no plan")


def test_a_real_runtime_tells_its_reason(parts: SimpleNamespace) -> None:
    """TensorRT-RTX itself, which can be imported anywhere, refuses a file that is no plan, and its log is heard."""
    runtime = pytest.importorskip("tensorrt_rtx_bindings")
    with pytest.raises(parts.plan_file.PlanFailed, match="Serialization"):
        parts.plan_file.open_plan(runtime, b"no plan" * 100)
    assert "tensorrt_rtx" in dict(parts.plan_file.installed_runtimes())


def test_the_doubles_have_no_name_that_the_real_ones_lack() -> None:
    """Every call and enumerator that the doubles answer exists in TensorRT-RTX's bindings."""
    runtime = pytest.importorskip("tensorrt_rtx_bindings")
    own = {"runtime", "addresses", "shape", "scratch", "version", "ran_version", "shape_calls"}
    assert set(vars(HostEngine(HostTensorRT(HostCuda())))) | public(HostEngine) <= {
        "runtime",
        *dir(runtime.ICudaEngine),
    }
    context = HostContext(HostTensorRT(HostCuda()), first=True)
    assert (set(vars(context)) | public(HostContext)) - own <= set(dir(runtime.IExecutionContext))
    for name in ("TensorIOMode", "TensorLocation", "TensorFormat", "ExecutionContextAllocationStrategy"):
        assert set(getattr(HostTensorRT, name).__members__) <= set(getattr(runtime, name).__members__)
    # What the stand-in uses of TensorRT-RTX alone.
    assert {"cuda_graph_strategy"} <= set(dir(runtime.IRuntimeConfig))
    assert "WHOLE_GRAPH_CAPTURE" in runtime.CudaGraphStrategy.__members__


def test_the_gpu_double_has_no_call_that_cuda_lacks() -> None:
    """Every call of the GPU made of host memory exists in CUDA's bindings."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = {name for name in dir(HostCuda) if name.startswith("cuda")}
    assert names <= set(dir(runtime))
    for kind in ("cudaDeviceAttr", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        assert set(vars(getattr(HostCuda, kind))) <= set(getattr(runtime, kind).__members__)


def public(kind: type) -> set[str]:
    """What a class defines itself."""
    return {name for name in vars(kind) if not name.startswith("_")}


def test_a_failing_call_is_named(parts: SimpleNamespace) -> None:
    """An error of CUDA names the call and CUDA's own word for it."""
    host = HostCuda()
    cuda = parts.cuda_memory.Cuda(host, 0)
    small = cuda.device_memory(4)
    with pytest.raises(parts.cuda_memory.CudaFailed, match="cudaMemcpyAsync failed: cudaErrorInvalidValue"):
        cuda.upload(small, cuda.pinned_memory(8))


def test_the_configuration_of_the_plan_is_accepted(parts: SimpleNamespace, tensors: list[Any]) -> None:
    """A configuration that names the plan's tensors, types and sizes can be served, with or without a batch axis."""
    parts.plan_checks.check_plan(CONFIG, tensors)
    parts.plan_checks.check_plan({**CONFIG, "output": CONFIG["output"][:1]}, tensors)
    plain = {
        "input": [{"name": "IN", "data_type": "TYPE_FP32", "dims": ["-1", "4"]}],
        "output": [{"name": "SUM", "data_type": "TYPE_INT32", "dims": ["-1", "1"]}],
    }
    parts.plan_checks.check_plan(plain, tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"max_batch_size": 16},
            r"takes batches of 1 to 8 of 'IN', and max_batch_size is 16: build the plan for 1 to 16",
        ),
        ({"output": [{"name": "MEAN", "data_type": "TYPE_FP32", "dims": ["1"]}]}, "output 'MEAN' is not in the plan"),
        ({"output": [{"name": "SUM", "data_type": "TYPE_INT64", "dims": ["1"]}]}, "'SUM' is TYPE_INT64 in the .*INT32"),
        ({"output": [{"name": "SUM", "data_type": "TYPE_INT32", "dims": ["2"]}]}, r"'SUM' is \[-1, 2\] in the"),
        ({"input": []}, "the plan's input 'IN' is not in the configuration"),
    ],
    ids=["batch", "name", "type", "dims", "input"],
)
def test_a_configuration_of_another_plan_is_refused(
    parts: SimpleNamespace, tensors: list[Any], change: dict[str, Any], words: str
) -> None:
    """Each way in which plan and configuration can disagree is told with the tensor and both sides."""
    with pytest.raises(RuntimeError, match=words):
        parts.plan_checks.check_plan({**CONFIG, **change}, tensors)


def test_tensors_that_numpy_or_the_buffers_cannot_hold_are_refused(parts: SimpleNamespace, tensors: list[Any]) -> None:
    """BF16 outputs, shape tensors and a profile that begins above one row are refused by name."""
    tensor = parts.plan_checks.PlanTensor
    cases = {
        "'SUM' is TYPE_INT32 in the configuration, BF16": tensor("SUM", "output", "BF16", (-1, 1), (), ()),
        "'SUM' of the plan is a shape tensor": tensor("SUM", "output", "INT32", (-1, 1), (), (), plain=False),
    }
    for words, changed in cases.items():
        with pytest.raises(RuntimeError, match=words):
            parts.plan_checks.check_plan(CONFIG, [*tensors[:2], changed])
    fixed = tensor("IN", "input", "FLOAT", (8, 4), (8, 4), (8, 4))
    with pytest.raises(RuntimeError, match="batches of 8 to 8"):
        parts.plan_checks.check_plan(CONFIG, [fixed, *tensors[1:]])


@pytest.mark.parametrize(
    ("target", "here"),
    [
        (TARGET, {}),
        ({}, {}),
        ({**TARGET, "compute_capabilities": []}, {}),
        ({**TARGET, "compute_capabilities": ["8.0"], "hardware_compatibility": "AMPERE_PLUS"}, {}),
        ({**TARGET, "compute_capabilities": ["8.0"], "hardware_compatibility": True}, {"capability": (12, 0)}),
        ({**TARGET, "version": "11.0.0.1", "version_compatible": True}, {}),
        ({**TARGET, "version": "10.16.1.11", "version_compatible": True}, {}),
    ],
)
def test_a_plan_built_for_this_machine_is_accepted(
    parts: SimpleNamespace, target: dict[str, Any], here: dict[str, Any]
) -> None:
    """Runtime, version and GPU are the manifest's, or the plan was built to be compatible with them."""
    parts.plan_checks.check_target(Path("model.plan"), target, machine(parts, **here))


@pytest.mark.parametrize(
    ("target", "here", "words"),
    [
        (TARGET, {"version": "10.16.1.11"}, "built with TensorRT 11.4.1.9, and this server has 10.16.1.11"),
        (TARGET, {"capability": (8, 0), "gpu": "NVIDIA A100"}, "compute capability 9.0, and NVIDIA A100 has 8.0"),
        (TARGET, {"runtime": "tensorrt_rtx"}, "built for TensorRT 11.4.1.9, and this server has TensorRT-RTX"),
        ({**TARGET, "hardware_compatibility": "ampere_plus"}, {"capability": (8, 6)}, "has 8.6"),
        ({**TARGET, "hardware_compatibility": "same_compute_capability"}, {"capability": (12, 0)}, "has 12.0"),
        ({**TARGET, "version": "11.10.0.1", "version_compatible": True}, {}, "11.10.0.1, and this server has 11.4.1.9"),
        ({**TARGET, "version": "new", "version_compatible": True}, {}, "manifest of model.plan is damaged: .*'new'"),
        ({**TARGET, "compute_capabilities": ["sm90"]}, {}, "manifest of model.plan is damaged: .*'sm90'"),
    ],
)  # fmt: skip
def test_a_plan_built_for_another_machine_is_refused(
    parts: SimpleNamespace, target: dict[str, Any], here: dict[str, Any], words: str
) -> None:
    """Another runtime, version or GPU is told with both sides, before the plan is opened."""
    with pytest.raises(RuntimeError, match=words):
        parts.plan_checks.check_target(Path("model.plan"), target, machine(parts, **here))


def test_what_the_builder_writes_the_stand_in_understands(parts: SimpleNamespace) -> None:
    """A plan built by the exporter is accepted on the GPUs of its manifest and with the reviewed config's tensors."""
    pytest.importorskip("tensorrt_rtx_bindings")
    checks, path = parts.plan_checks, Path("model.plan")
    plan = build_plan(probe_network.unet(), PlanSettings(runtime="tensorrt_rtx", batch=(1, 2, MAX_BATCH)))
    ada = machine(parts, runtime=plan.runtime, version=plan.version, capability=(8, 9))
    checks.check_target(path, plan.target, ada)
    turing = machine(parts, runtime=plan.runtime, version=plan.version, capability=(7, 5))
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0 and later, and NVIDIA H200 has 7\.5"):
        checks.check_target(path, plan.target, turing)
    sizes = {True: ((1, 1, 512, 512), (MAX_BATCH, 1, 512, 512)), False: ((), ())}
    tensors = [
        checks.PlanTensor(t.name, "input" if t.is_input else "output", t.datatype, t.shape, *sizes[t.is_input])
        for t in plan.tensors
    ]
    config = MessageToDict(read_config(MODELS / "unet" / "config.pbtxt"), preserving_proto_field_name=True)
    checks.check_plan(config, tensors)
