"""FP16 from FP32: what becomes FP16, what stays and why, and that the decisions stay the same."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import logit_network
from groundglass.errors import MissingExtra, ModelError
from groundglass_client.intake import decode_hu, open_study
from groundglass_client.phantom import PhantomSettings, write_phantom
from groundglass_export.engine import LOGITS, OnnxEngine, OnnxPreprocess, open_session
from groundglass_export.graph_types import conv_weight_types, value_types
from groundglass_export.half import HalfModel, HalfSettings, to_half

PROJECT = Path(__file__).parents[2]
PARAMETERS = 28_768_825


@pytest.fixture(scope="module")
def small() -> HalfModel:
    """The network of the engine tests in FP16: one convolution, the served tail, an area counted in floats."""
    return to_half(logit_network.unet())


def _images(count: int = 2) -> np.ndarray:
    """Float32 (count, 1, 512, 512) with smooth patches on both sides of the lesion threshold."""
    y, x = np.mgrid[0:512, 0:512] / 512
    planes = [0.9 + 0.1 * np.sin(9 * y + number) * np.cos(7 * x) for number in range(count)]
    return np.stack(planes)[:, None].astype(np.float32)


def test_every_convolution_of_the_network_gets_fp16_weights(
    half_unet: HalfModel, shipped_unet: onnx.ModelProto
) -> None:
    """All 85 convolutions take FP16 weights straight from the file; those of the FP32 graph are cast to FP32 first."""
    assert set(conv_weight_types(shipped_unet).values()) == {"FLOAT"}
    assert set(conv_weight_types(half_unet.model).values()) == {"FLOAT16"}
    assert (half_unet.convolutions, half_unet.half_convolutions) == (85, 85)
    stored = {tensor.name for tensor in half_unet.model.graph.initializer}
    weights = {node.input[1] for node in half_unet.model.graph.node if node.op_type == "Conv"}
    assert weights <= stored
    assert not any(node.op_type == "Cast" and node.input[0] in stored for node in half_unet.model.graph.node)


def test_only_the_decision_stays_fp32(half_unet: HalfModel) -> None:
    """On the network itself nothing is kept but the four nodes after the logits that decide and pack the mask."""
    assert {(node.operator, node.reason) for node in half_unet.kept_fp32} == {
        (operator, "decision") for operator in ("GreaterOrEqual", "Reshape", "Mul", "ReduceSum")
    }
    assert half_unet.share_fp16 > 0.97
    assert half_unet.as_dict()["kept_fp32"]["node_ge"] == "GreaterOrEqual: decision"


def test_the_file_is_half_of_an_fp32_one(half_unet: HalfModel) -> None:
    """It takes two bytes a parameter, where FP32 takes four."""
    size = half_unet.model.ByteSize()
    assert 2.0 * PARAMETERS * 0.99 < size < 2.0 * PARAMETERS * 1.01


def test_masks_and_verdicts_of_the_network(half_unet: HalfModel, shipped_unet: onnx.ModelProto, tmp_path: Path) -> None:
    """The cast network marks the same pixels of a phantom, to a dice of 0.995, and gives the same verdicts."""
    write_phantom(PhantomSettings(slices=7, lesion=(2, 5)), tmp_path / "phantom")
    graph = OnnxPreprocess(PROJECT / "model_repository" / "preprocess" / "1" / "model.onnx")
    with open_study(tmp_path / "phantom") as study:
        images = np.stack([graph.image(decode_hu(study.slices[index])) for index in (0, 3)])
    expected, found = (OnnxEngine(model).answers(images) for model in (shipped_unet, half_unet.model))
    assert expected.positive.tolist() == found.positive.tolist() == [False, True]
    dice = 2 * (expected.mask & found.mask).sum() / (expected.mask.sum() + found.mask.sum())
    assert dice >= 0.995


def test_inputs_outputs_and_logits_keep_their_types(small: HalfModel) -> None:
    """Outside, the types are those of the FP32 graph; inside, LOGITS is FP32 behind an FP16 convolution."""
    origin, found = logit_network.unet().graph, small.model.graph
    assert [value.SerializeToString() for value in (*found.input, *found.output)] == [
        value.SerializeToString() for value in (*origin.input, *origin.output)
    ]
    types = value_types(small.model)
    assert types[LOGITS] == TensorProto.FLOAT
    assert types[found.node[1].output[0]] == TensorProto.FLOAT16
    assert found.node[1].op_type == "Conv"


def test_answers_of_the_small_network(small: HalfModel) -> None:
    """Probabilities differ by FP16's rounding, and by no more."""
    expected = OnnxEngine(logit_network.unet()).answers(_images())
    found = OnnxEngine(small.model).answers(_images())
    assert expected.probability is not None
    assert found.probability is not None
    assert 0 < np.abs(expected.probability - found.probability).max() < 0.01


def test_a_count_beyond_fp16_is_exact(small: HalfModel) -> None:
    """262,144 lesion pixels are counted as such, though FP16 ends at 65,504."""
    answer = OnnxEngine(small.model).answers(np.ones((1, 1, 512, 512), np.float32))
    assert int(answer.mask.sum()) == int(answer.pixels[0]) > 255_000


def test_weights_stored_in_half_lose_their_cast() -> None:
    """An FP16 initializer that was cast to FP32 for the convolution is read by it directly."""
    model = logit_network.unet()
    logit_network.half_stored(model, "weight")
    half = to_half(model).model
    assert conv_weight_types(half) == {half.graph.node[1].name: "FLOAT16"}
    assert [node.op_type for node in half.graph.node[:3]] == ["Cast", "Conv", "Cast"]


def _with_detour(gain: float) -> onnx.ModelProto:
    """The small network whose logits are first multiplied by ``gain``, then divided by it."""
    model = logit_network.unet()
    model.graph.initializer.append(numpy_helper.from_array(np.float32(gain), "gain"))
    logit_network.with_node_after(
        model,
        LOGITS,
        lambda before, after: [
            helper.make_node("Mul", [before, "gain"], ["far"], name="up"),
            helper.make_node("Div", ["far", "gain"], [after], name="down"),
        ],
    )
    return model


def test_values_beyond_fp16_make_an_island() -> None:
    """Nodes whose values leave FP16 on the calibration images stay FP32, are listed, and answer right."""
    model = _with_detour(30_000.0)
    half = to_half(model, [_images(1), np.ones((1, 1, 512, 512), np.float32)])
    assert {(node.name, node.reason) for node in half.kept_fp32 if node.reason != "decision"} == {
        ("up", "range"),
        ("down", "range"),
    }
    expected, found = (OnnxEngine(each).answers(_images()) for each in (model, half.model))
    assert (expected.mask == found.mask).mean() > 0.99


def test_without_images_a_value_may_overflow() -> None:
    """The calibration images are what finds the island: without them the same graph's logits are not finite."""
    overflowing = OnnxEngine(to_half(_with_detour(30_000.0)).model).answers(_images(1))
    assert overflowing.probability is not None
    assert not np.isfinite(overflowing.probability).all()


def test_weights_too_small_for_fp16_stay() -> None:
    """Weights below FP16's normal range, which rounding would change by percents, keep their node in FP32."""
    model = logit_network.unet()
    logit_network.set_constant(model, "weight", np.linspace(1e-7, 3e-7, 9, dtype=np.float32).reshape(1, 1, 3, 3))
    half = to_half(model)
    assert (half.kept_fp32[0].operator, half.kept_fp32[0].reason) == ("Conv", "accuracy")
    assert set(conv_weight_types(half.model).values()) == {"FLOAT"}
    assert half.half_convolutions == 0


def test_a_named_node_stays() -> None:
    """A node that the caller names is left in FP32."""
    half = to_half(_with_detour(2.0), settings=HalfSettings(keep_fp32=("up",)))
    assert [node.name for node in half.kept_fp32 if node.reason == "named"] == ["up"]
    with pytest.raises(ModelError, match=r"no node .*'upp'"):
        to_half(_with_detour(2.0), settings=HalfSettings(keep_fp32=("upp",)))


def test_an_operator_without_fp16_stays() -> None:
    """Celu is defined for FP32 alone: it is left so, and listed."""
    model = logit_network.unet()
    logit_network.with_node_after(
        model, LOGITS, lambda before, after: [helper.make_node("Celu", [before], [after], name="celu")]
    )
    half = to_half(model)
    assert ("celu", "operator") in {(node.name, node.reason) for node in half.kept_fp32}
    open_session(half.model, "celu")


_DIGEST = """
import hashlib, logit_network
from groundglass_export.half import to_half
print(hashlib.sha256(to_half(logit_network.unet()).model.SerializeToString(deterministic=True)).hexdigest())
"""


def test_same_graph_same_bytes(small: HalfModel) -> None:
    """Another process, with another order of its sets, gives the same digest."""
    environment = {**os.environ, "PYTHONHASHSEED": "12", "PYTHONPATH": str(PROJECT / "tests")}
    ran = subprocess.run([sys.executable, "-c", _DIGEST], env=environment, capture_output=True, text=True, check=True)
    expected = hashlib.sha256(small.model.SerializeToString(deterministic=True)).hexdigest()
    assert ran.stdout == expected + "\n"


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """The converter's own log does not reach the caller's terminal or log."""
    to_half(logit_network.unet())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_weights_that_are_not_finite_are_refused() -> None:
    """One infinite weight is named."""
    model = logit_network.unet()
    logit_network.set_constant(model, "weight", np.full((1, 1, 3, 3), np.inf, np.float32))
    with pytest.raises(ModelError, match="weights 'weight' are not finite"):
        to_half(model)


@pytest.mark.parametrize("opset", [13, 24])
def test_an_opset_out_of_range_is_refused(opset: int) -> None:
    """The message says which opset was found and which are taken."""
    model = logit_network.unet()
    model.opset_import[0].version = opset
    with pytest.raises(ModelError, match=f"opset {opset}; FP16 takes 14 to 23"):
        to_half(model)


def test_a_foreign_operator_is_refused() -> None:
    """An operator that ONNX does not define is named."""
    model = logit_network.unet()
    model.graph.node[0].domain = "com.example"
    model.graph.node[0].op_type = "DeformedConv"
    with pytest.raises(ModelError, match="operator DeformedConv"):
        to_half(model)


def test_a_quantized_graph_is_refused() -> None:
    """FP16 is not made from INT8."""
    model = logit_network.unet()
    model.graph.node[0].op_type = "ConvInteger"
    with pytest.raises(ModelError, match="is quantized"):
        to_half(model)


def test_an_image_that_does_not_fit_is_refused() -> None:
    """A calibration image of another shape is refused with that shape."""
    with pytest.raises(ModelError, match=r"float32 \(1, 1, 64, 64\)"):
        to_half(logit_network.unet(), [np.zeros((1, 1, 64, 64), np.float32)])


def test_without_modelopt_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which package is missing and how to get it."""
    monkeypatch.setitem(sys.modules, "modelopt.onnx.autocast", None)
    with pytest.raises(MissingExtra, match=r"nvidia-modelopt is not installed.*groundglass\[export\]"):
        to_half(logit_network.unet())
