"""What inspectors and runtimes say is read right, for versions that can't be installed here too."""

from __future__ import annotations

import json
import sys

import pytest

from groundglass.errors import ModelError, ParityError
from groundglass_export.plan_inspection import (
    LayerPrecision,
    PrecisionReport,
    layers_from_json,
    layers_from_log,
    precision_report,
    require_precision,
)
from groundglass_export.plan_reports import BuildLog, Phases
from groundglass_export.tensorrt_runtime import load_tensorrt


def _tensor(name: str, dims: list[int], **kind: str) -> dict[str, object]:
    return {"Name": name, "Dimensions": dims, **kind}


def test_the_inspector_of_tensorrt_10() -> None:
    """Type and format share a field, weights have one of their own, and nodes are separated by a control character."""
    layer = {
        "Name": "conv1 + relu1",
        "LayerType": "CaskConvolution",
        "ParameterType": "Convolution",
        "Inputs": [
            _tensor("a", [1, 8, 4, 4], **{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"})
        ],
        "Outputs": [_tensor("b", [1, 8, 4, 4], **{"Format/Datatype": "Row major linear FP32"})],
        "Weights": {"Type": "Half", "Count": 576},
        "Bias": {"Type": "Half", "Count": 8},
        "Metadata": "[ONNX Layer: conv1]\u001e[ONNX Layer: relu1]",
    }
    found = layers_from_json(json.dumps({"Layers": [layer], "Bindings": ["a", "b"]}))
    assert found == (LayerPrecision("conv1 + relu1", "Convolution", "fp16", "fp16", ("conv1", "relu1")),)


def test_the_inspector_of_tensorrt_11() -> None:
    """Type and format have a field each; the largest constant is the weights, not a scalar beside them."""
    layer = {
        "Name": "conv1_myl0_2",
        "LayerType": "correlation",
        "Inputs": [_tensor("a", [-1, 8, 4, 4], Datatype="Half", Format="(NHWC) Channel major format")],
        "Constants": [_tensor("alpha", [1], Datatype="Float"), _tensor("w", [8, 8, 3, 3], Datatype="Half")],
        "Outputs": [_tensor("b", [-1, 8, 4, 4], Datatype="Half")],
        "Metadata": "[ONNX Layer: conv1]",
    }
    integers = {"Name": "count", "LayerType": "kgen", "Inputs": [], "Outputs": [_tensor("n", [1], Datatype="Int32")]}
    found = layers_from_json(json.dumps({"Layers": [layer, integers], "I/O Tensors": []}))
    assert found == (
        LayerPrecision("conv1_myl0_2", "correlation", "fp16", "fp16", ("conv1",)),
        LayerPrecision("count", "kgen", "", "", ()),
    )


def test_names_alone_are_refused() -> None:
    """A plan that was built without detailed profiling tells no types."""
    with pytest.raises(ModelError, match="holds only names of layers"):
        layers_from_json('{"Layers": ["conv1"]}')


def test_a_line_of_the_build_log() -> None:
    """A layer's line is read; a line of another form is left out."""
    line = (
        "Name: mul_myl0_1, LayerType: kgen, Inputs: [ { Name: a, Dimensions: [-1,4], Strides: [4,1], Datatype: Half, "
        "Format: (Linear) }], Constants: [], Outputs: [ { Name: b, Dimensions: [-1,4], Strides: [4,1], Datatype: "
        "Float, Format: (Linear) }], TacticName: x, StreamId: 0, Metadata: [ONNX Layer: mul][ONNX Layer: cast]"
    )
    assert layers_from_log([line, "Name: something else"]) == (
        LayerPrecision("mul_myl0_1", "kgen", "fp32", "", ("mul", "cast")),
    )


def test_a_layout_change_does_not_speak_for_a_convolution() -> None:
    """A layer without weights that names a convolution does not hide the one that runs it, in either order."""
    moves = LayerPrecision("move", "kgen", "fp16", "", ("conv1",))
    runs = LayerPrecision("conv", "correlation", "fp32", "fp32", ("conv1",))
    for found in ([moves, runs], [runs, moves]):
        report = precision_report(found, "inspector", convolutions=["conv1", "gone"], sizes=(10, 5))
        assert report.other_convolutions == ("conv1", "gone")
        assert (report.layers, report.half_layers) == (2, 1)


def _report(**changes: object) -> PrecisionReport:
    values = {
        "source": "inspector",
        "layers": 10,
        "half_layers": 9,
        "convolutions": 3,
        "other_convolutions": (),
        "engine_bytes": 4_200_000,
        "weights": 2_000_000,
    }
    return PrecisionReport(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0, "half_layers": 0}, "its layers could not be read"),
        ({"half_layers": 7}, "70% of its layers are FP16, expected 80%"),
        ({"other_convolutions": ("a", "b")}, "2 of 3 convolutions are not FP16 .'a' first"),
        ({"engine_bytes": 8_000_000}, r"4\.0 bytes a weight"),
    ],
)
def test_each_proof_can_fail(changes: dict[str, object], message: str) -> None:
    """Layers, convolutions and size are checked apart from one another."""
    require_precision(_report(), "fp16")
    with pytest.raises(ParityError, match=message):
        require_precision(_report(**changes), "fp16")


def test_a_kept_convolution_is_allowed() -> None:
    """A convolution that the FP16 graph keeps in FP32 on purpose does not fail its plan."""
    require_precision(_report(other_convolutions=("a",)), "fp16", kept_fp32=("a",))


def test_nested_phases_make_one_share() -> None:
    """Phases inside a phase fill its steps."""
    told: list[tuple[str, float]] = []
    phases = Phases(lambda name, share: told.append((name, share)))
    phases.start("build", 2)
    phases.start("tune", 4)
    phases.step("tune", 1)
    phases.finish("tune")
    phases.step("build", 0)
    phases.finish("build")
    assert told == [("tune", 0.25), ("tune", 0.25), ("build", 0.5), ("build", 1.0)]


def test_the_first_error_is_the_complaint() -> None:
    """It is put on one line, and cut when it is long."""
    log = BuildLog()
    assert log.complaint() == "it gave no reason"
    log.take("WARNING", "not this")
    log.take("ERROR", "first\nline " + "x" * 400)
    log.take("ERROR", "second")
    assert log.complaint().startswith("first line xxx")
    assert len(log.complaint()) == 300


def test_without_tensorrt_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways are named, and that the plan must be built where it is served."""
    for module in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=r"built by the one that serves it.*container.*tensorrt-rtx-cu13-libs"):
        load_tensorrt()
    with pytest.raises(ModelError, match="inside the container that will serve the plan"):
        load_tensorrt("tensorrt")
