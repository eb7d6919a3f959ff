"""Plans built by TensorRT-RTX's real parser and builder, which need no GPU, and what is read back from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import logit_network
from groundglass.errors import ModelError, ParityError, SettingError
from groundglass_export.engine import LOGITS
from groundglass_export.half import HalfModel, to_half
from groundglass_export.plan import Plan, PlanSettings, PlanTensor, build_plan, write_plan
from groundglass_export.plan_inspection import layers, require_precision
from groundglass_export.tensorrt_runtime import load_tensorrt

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has no wheel for this Python")

PROJECT = Path(__file__).parents[2]
RTX = PlanSettings(runtime="tensorrt_rtx", batch=(1, 8, 16))


@pytest.fixture(scope="module")
def unet_plan(half_unet: HalfModel) -> Plan:
    """The shipped network, FP16, batch 1 to 16."""
    return build_plan(half_unet.model, RTX)


@pytest.fixture(scope="module")
def preprocess() -> onnx.ModelProto:
    """The shipped preprocess graph."""
    return onnx.load(PROJECT / "model_repository" / "preprocess" / "1" / "model.onnx")


def test_the_network_is_built_in_fp16(unet_plan: Plan) -> None:
    """All 85 convolutions read FP16 weights in the finished engine, every layer is FP16, and so is its size."""
    require_precision(unet_plan.precision, "fp16")
    assert unet_plan.precision.convolutions == 85
    assert unet_plan.precision.other_convolutions == ()
    assert unet_plan.precision.share_fp16 > 0.95
    assert unet_plan.precision.layers > 85
    assert 2.0 < unet_plan.precision.bytes_per_weight < 2.2
    assert unet_plan.precision.as_dict()["convolutions_fp16"] == 85


def test_the_plan_keeps_the_contract(unet_plan: Plan) -> None:
    """Inputs and outputs are those of the graph, with a free batch axis."""
    assert unet_plan.tensors == (
        PlanTensor("IMAGE", True, "FLOAT", (-1, 1, 512, 512)),
        PlanTensor("MASK", False, "UINT8", (-1, 512, 64)),
        PlanTensor("LESION_PIXELS", False, "INT32", (-1, 1)),
        PlanTensor("SLICE_POSITIVE", False, "BOOL", (-1, 1)),
    )
    assert unet_plan.profile == {"min": 1, "opt": 8, "max": 16}
    assert unet_plan.widened_inputs == ()


def test_the_target_says_where_it_runs(unet_plan: Plan) -> None:
    """Runtime, version and GPU are there for the manifest; RTX's default plan runs from 8.0 on."""
    runtime = load_tensorrt("tensorrt_rtx")
    assert (unet_plan.runtime, unet_plan.version) == ("tensorrt_rtx", runtime.version)
    assert unet_plan.target["compute_capabilities"] == ["8.0"]
    assert unet_plan.target["hardware_compatibility"] == "ampere_plus"
    chosen = build_plan(logit_network.unet(), PlanSettings("tensorrt_rtx", compute_capabilities=("8.6", "8.9")))
    assert chosen.target["compute_capabilities"] == ["8.6", "8.9"]
    assert chosen.target["hardware_compatibility"] == "none"


def test_an_fp32_graph_fails_the_precision_check(shipped_unet: onnx.ModelProto) -> None:
    """Nothing turns an FP32 graph into an FP16 plan: the check says so by convolutions, layers and size."""
    plan = build_plan(shipped_unet, RTX)
    assert plan.precision.bytes_per_weight > 4.0
    with pytest.raises(ParityError, match=r"85 of 85 convolutions are not FP16.*0% of its layers.*4\.1 bytes a weight"):
        require_precision(plan.precision, "fp16")
    require_precision(plan.precision, "fp32")


def test_one_fp32_convolution_is_found() -> None:
    """A single convolution that stayed FP32 fails the check by name, unless it is known to be kept."""
    model = logit_network.unet()
    logit_network.set_constant(model, "weight", np.full((1, 1, 3, 3), 1e-7, np.float32))
    half = to_half(model)
    plan = build_plan(half.model, RTX)
    (name,) = plan.precision.other_convolutions
    with pytest.raises(ParityError, match=f"1 of 1 convolutions are not FP16 .'{name}' first"):
        require_precision(plan.precision, "fp16")
    assert name in {node.name for node in half.kept_fp32}


def test_preprocess_takes_wider_numbers(preprocess: onnx.ModelProto) -> None:
    """TensorRT has no INT16: the plan of preprocess takes INT32 and any number of rows and columns, in FP16."""
    plan = build_plan(to_half(preprocess).model, RTX)
    assert plan.widened_inputs == ("HU",)
    assert plan.tensors == (
        PlanTensor("HU", True, "INT32", (-1, -1, -1)),
        PlanTensor("IMAGE", False, "FLOAT", (-1, 1, 512, 512)),
    )
    require_precision(plan.precision, "fp16")
    with pytest.raises(ParityError, match="0% of its layers"):
        require_precision(build_plan(preprocess, RTX).precision, "fp16")


def test_logits_can_be_observed() -> None:
    """An inner value becomes an output of the plan, in FP32, for the parity gate."""
    plan = build_plan(to_half(logit_network.unet()).model, PlanSettings("tensorrt_rtx", observe=(LOGITS,)))
    assert PlanTensor(LOGITS, False, "FLOAT", (-1, 1, 512, 512)) in plan.tensors
    with pytest.raises(ModelError, match="no value of 'unet' is called 'LOGIT'"):
        build_plan(logit_network.unet(), PlanSettings("tensorrt_rtx", observe=("LOGIT",)))


def test_progress_grows_to_one() -> None:
    """The share of the work done never falls, and ends at one."""
    shares: list[float] = []
    build_plan(logit_network.unet(), RTX, lambda phase, share: shares.append(share))
    assert len(shares) > 10
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_an_interrupt_stops_the_build() -> None:
    """What the progress callback raises reaches the caller, Ctrl-C included."""

    def interrupted(phase: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(logit_network.unet(), RTX, interrupted)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """The runtime's log, its errors without a GPU included, does not reach the terminal."""
    build_plan(logit_network.unet(), RTX)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PlanSettings("tensorrt_rtx", batch=(1, 32, 16)), "batch profile 1:32:16: expected 1 <= min <= opt <= max"),
        (PlanSettings("tensorrt_rtx", batch=(0, 1, 2)), "batch profile 0:1:2"),
        (PlanSettings("tensorrt_rtx", side=(512, 256, 1024)), "side profile 512:256:1024"),
        (PlanSettings("tensort"), "runtime 'tensort': expected one of auto, tensorrt, tensorrt_rtx"),
        (PlanSettings("tensorrt_rtx", compute_capabilities=("3.5",)), r"compute capability 3\.5; it knows 7\.5, 8\.0"),
        (PlanSettings("tensorrt_rtx", version_compatible=True), "no compatibility options"),
        (PlanSettings("tensorrt_rtx", hardware_compatible=True), "no compatibility options"),
    ],
)
def test_settings_that_cannot_be(settings: PlanSettings, message: str) -> None:
    """A setting is refused by name before anything is built."""
    with pytest.raises(SettingError, match=message):
        build_plan(logit_network.unet(), settings)


def test_an_operator_that_tensorrt_lacks_is_named() -> None:
    """The message names operator and node."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Bernoulli", ["x"], ["y"], name="coin")], "toss", values[:1], values[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    with pytest.raises(ModelError, match=r"does not take the operator Bernoulli \('coin'\) of 'toss'"):
        build_plan(model, RTX)


def test_a_type_that_tensorrt_lacks_is_named() -> None:
    """A DOUBLE input is refused with its name."""
    values = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "wide", values[:1], values[1:])
    with pytest.raises(ModelError, match="x of 'wide' is DOUBLE"):
        build_plan(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), RTX)


def test_a_broken_graph_is_refused(tmp_path: Path) -> None:
    """A file that is no ONNX is named."""
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x00" * 40)
    with pytest.raises(ModelError, match=r"broken\.onnx is no readable ONNX model"):
        build_plan(broken, RTX)


def test_a_plan_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """The file is the plan; where no file can be written, there is an error and nothing else."""
    plan = build_plan(logit_network.unet(), RTX)
    assert write_plan(plan, tmp_path / "unet" / "model.plan").read_bytes() == plan.data
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.plan was not written"):
        write_plan(plan, tmp_path / "file" / "model.plan")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "model.plan", "unet"]


def test_two_plans_of_one_graph_agree(unet_plan: Plan, half_unet: HalfModel) -> None:
    """A second build has the same layers and types; the plan says why its bytes may differ."""
    again = build_plan(half_unet.model, RTX)
    assert again.precision == unet_plan.precision
    assert again.reproducible.startswith("no: ")


def test_a_plan_that_cannot_be_opened_is_refused() -> None:
    """The inspector says that it takes a GPU, or that these bytes are no plan."""
    with pytest.raises(ModelError, match="can't open the plan here"):
        layers(b"no plan", load_tensorrt("tensorrt_rtx"))
