"""The benchmark of bare engines: what it counts, what it writes, and how it says no."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import probe_network
from groundglass.errors import ModelError, SettingError
from groundglass_bench import rounds

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    """A module of the benchmarks' folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


arithmetic = load("arithmetic")


@pytest.fixture
def graph_file(tmp_path: Path) -> Path:
    """A near-free network of the served contract."""
    path = tmp_path / "probe.onnx"
    onnx.save(probe_network.unet(), path)
    return path


def run_script(*options: object) -> subprocess.CompletedProcess[str]:
    """The script as a person calls it."""
    command = [sys.executable, str(BENCHMARKS / "engines.py"), "--device", "cpu", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def network(
    nodes: list[onnx.NodeProto], weights: dict[str, tuple[int, ...]], image: tuple[int, ...]
) -> onnx.ModelProto:
    """A graph of X (n, *image) -> Y with the given weights."""
    graph = helper.make_graph(
        nodes,
        "counted",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["n", *image])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_convolutions_are_counted_as_by_hand() -> None:
    """A strided convolution, a depthwise one and a pointwise one: rows x columns x output x input channels x taps."""
    nodes = [
        helper.make_node("Conv", ["X", "a"], ["1"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["1"], ["2"]),
        helper.make_node("Conv", ["2", "b"], ["3"], group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["3", "c"], ["Y"]),
    ]
    model = network(nodes, {"a": (8, 3, 3, 3), "b": (8, 1, 3, 3), "c": (5, 8, 1, 1)}, (3, 32, 16))
    by_hand = 16 * 8 * 8 * 3 * 9 + 16 * 8 * 8 * 9 + 16 * 8 * 5 * 8
    assert arithmetic.macs_per_slice(model) == by_hand


def test_matrix_products_and_transposed_convolutions_are_counted() -> None:
    """A matrix product counts its inner size for every element it makes, a transposed convolution its taps."""
    nodes = [
        helper.make_node("ConvTranspose", ["X", "a"], ["1"], strides=[2, 2]),
        helper.make_node("MatMul", ["1", "b"], ["Y"]),
    ]
    model = network(nodes, {"a": (4, 6, 2, 2), "b": (10, 7)}, (4, 5, 5))
    assert arithmetic.macs_per_slice(model) == 4 * 5 * 5 * 6 * 4 + 6 * 10 * 7 * 10


def test_unknown_shapes_are_refused() -> None:
    """A graph whose sizes are free beyond the batch can't be counted, and the node is named."""
    model = network([helper.make_node("Conv", ["X", "a"], ["Y"], name="stem")], {"a": (8, 3, 3, 3)}, (3, 8, 8))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "rows"
    with pytest.raises(ModelError, match="'stem'"):
        arithmetic.macs_per_slice(model)


def test_the_limit_is_two_operations_a_multiply_add() -> None:
    """One TFLOP/s is at most 500 slices a second of one GMAC."""
    assert arithmetic.limit_slices_per_s(10**9, 1.0) == pytest.approx(500.0)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", None),
        ("NVIDIA L4", 121.0),
        ("Tesla T4", 65.0),
        ("AMD EPYC", None),
    ],
)
def test_a_device_is_found_by_the_words_of_its_name(device: str, peak: float | None) -> None:
    """An entry fits whole words only, and a device that is not in the table has no peak."""
    assert arithmetic.known_peak(device) == peak


class ScriptedClock:
    """Every work takes the seconds that it is told to; ``order`` says who ran."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def seconds(self, work: object, times: int) -> float:
        """Calls ``work`` once: it says its name and its seconds."""
        name, duration = work()  # type: ignore[operator]
        self.order.append(name)
        return duration * times


def test_engines_take_turns_and_the_median_is_reported() -> None:
    """After the warm-up rounds go A, B, A, B; a rate is slices over seconds, whatever fills the shortest duration."""
    clock = ScriptedClock()
    slow = iter([9.0, 2.0, 2.0, 4.0, 1.0])
    works = {"slow": lambda: ("slow", next(slow)), "quick": lambda: ("quick", 0.5)}
    found = rounds.measure(works, 8, rounds.Rounds((8,), repetitions=3, min_seconds=1.0), clock)
    turns = clock.order[-6:]
    assert all(before != after for before, after in pairwise(turns))
    assert found["slow"] == rounds.Rate(median=4.0, smallest=2.0, largest=8.0, repetitions=3, runs_each=1)
    assert (found["quick"].median, found["quick"].runs_each, found["quick"].spread) == (16.0, 2, 0.0)
    assert found["slow"].spread == pytest.approx(1.5)


@pytest.mark.parametrize("values", [((0,), 5, 1.0), ((65,), 5, 1.0), ((1,), 0, 1.0), ((1,), 5, -1.0)])
def test_scenarios_that_measure_nothing_are_refused(values: tuple[tuple[int, ...], int, float]) -> None:
    """Batch 0, a batch that is never served, no repetition and negative seconds are errors."""
    with pytest.raises(SettingError):
        rounds.Rounds(*values)


def test_the_script_writes_what_it_measured(graph_file: Path, tmp_path: Path) -> None:
    """JSON and Markdown hold rates, ratios, versions, machine, digests, and the reason for an engine that is absent."""
    out = tmp_path / "results"
    done = run_script(
        *("--fp32", graph_file, "--int8", graph_file, "--batch", 1, "--batch", 2),
        *("--repetitions", 2, "--min-seconds", 0, "--peak-tflops", 0.5, "--threads", 1, "--out", out),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "engines-cpu.json").read_text())
    assert set(found["slices_per_s"]) == {"onnx-fp32", "onnx-int8"}
    first = found["slices_per_s"]["onnx-fp32"]["2"]
    assert first["smallest"] <= first["median"] <= first["largest"]
    assert (first["times_reference"], first["repetitions"]) == (1.0, 2)
    assert found["absent"] == {"torch-fp32": "no checkpoint was given (--checkpoint)"}
    assert found["macs_per_slice"] == 512 * 64 * 8  # the probe network's one matrix product: bits into bytes
    assert found["files"]["fp32"]["file"] == "probe.onnx"
    assert found["host"]["threads"] == 1
    assert {"onnxruntime", "onnx", "numpy"} <= found["host"]["versions"].keys()
    text = (out / "engines-cpu.md").read_text()
    assert text in done.stdout
    assert "| onnx-int8 |" in text
    assert "torch-fp32: no checkpoint was given" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--batch", 0), "--batch 0: expected 1 to 64"),
        (("--engine", "caffe"), "--engine caffe: unknown on a CPU; known are onnx-fp32, onnx-int8, torch-fp32"),
        (("--int8", "no.onnx"), "--int8 no.onnx: no such file"),
        (("--engine", "torch-fp32"), "no engine can run here: torch-fp32: no checkpoint"),
        (("--engine", "onnx-int8", "--int8", __file__), "is no readable ONNX model"),
        (("--device", "tpu"), "--device tpu: expected cpu, gpu or auto"),
        (("--peak-tflops", -1), "--peak-tflops must be more than 0"),
    ],
    ids=["batch", "engine", "file", "absent", "corrupt", "device", "peak"],
)
def test_bad_input_is_one_clear_line(graph_file: Path, tmp_path: Path, options: tuple[object, ...], words: str) -> None:
    """Whatever can't be measured ends the script with one line and without results."""
    out = tmp_path / "results"
    done = run_script("--fp32", graph_file, "--out", out, *options)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not out.exists()
