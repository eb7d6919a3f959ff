"""Engines: an ONNX graph gives masks, counts, verdicts and probabilities, or one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from onnx import TensorProto, helper

import logit_network
import probe_network
from groundglass.errors import ModelError, RepositoryError
from groundglass.manifest import file_digest
from groundglass_export.engine import OnnxEngine, OnnxPreprocess, graph_precision, probability_of


def _images(count: int = 3) -> np.ndarray:
    window = OnnxPreprocess(probe_network.preprocess())
    return np.stack([window.image(hu) for hu in logit_network.noisy_slices([True, False, True][:count])])


def test_answers_are_those_of_numpy() -> None:
    """Mask, count, verdict and probability of a batch are what numpy computes from the definition of the network."""
    images = _images()
    answers = OnnxEngine(logit_network.unet()).answers(images)
    logits = np.stack([logit_network.logits(image[0]) for image in images])
    probability = 1 / (1 + np.exp(-logits))
    assert answers.probability is not None
    np.testing.assert_allclose(answers.probability, probability, atol=1e-5)
    clear = np.abs(probability - logit_network.PROBABILITY_THRESHOLD) > 1e-5
    assert np.array_equal(answers.mask[clear], probability[clear] >= logit_network.PROBABILITY_THRESHOLD)
    assert np.array_equal(answers.pixels, answers.mask.sum(axis=(1, 2)))
    assert answers.positive.tolist() == [True, False, True]
    assert (answers.mask.dtype, answers.pixels.dtype, answers.positive.dtype) == (np.bool_, np.int32, np.bool_)


def test_one_row_is_the_answer_to_one_slice() -> None:
    """A row of a batch's answers is the answer to that slice alone."""
    images = _images()
    engine = OnnxEngine(logit_network.unet())
    row, alone = engine.answers(images).row(2), engine.answers(images[2:])
    assert len(row) == 1
    assert np.array_equal(row.mask, alone.mask)
    assert (row.pixels, row.positive) == (alone.pixels, alone.positive)
    assert row.probability is not None
    assert alone.probability is not None
    np.testing.assert_allclose(row.probability, alone.probability, atol=1e-6)


def test_logits_are_observed_in_memory_only(tmp_path: Path) -> None:
    """Neither the graph nor the file that is observed changes, and the digest is the file's."""
    model = logit_network.unet()
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    before = model.SerializeToString(deterministic=True), file_digest(path)
    from_memory, from_file = OnnxEngine(model), OnnxEngine(path)
    assert from_memory.answers(_images(1)).probability is not None
    assert (model.SerializeToString(deterministic=True), file_digest(path)) == before
    assert from_file.digest == before[1]
    assert from_file.name == "model.onnx"


def test_logits_in_half_precision_are_observed_too() -> None:
    """A graph whose logits are FP16 shows them as well."""
    model = logit_network.unet()
    logit_network.set_constant(model, "weight", logit_network.constant(model, "weight").astype(np.float16))
    logit_network.set_constant(model, "bias", logit_network.constant(model, "bias").astype(np.float16))
    model.graph.node[0].input[0] = "half_image"
    model.graph.node.insert(0, helper.make_node("Cast", ["IMAGE"], ["half_image"], to=TensorProto.FLOAT16))
    logit_network.set_constant(model, "threshold", logit_network.constant(model, "threshold").astype(np.float16))
    engine = OnnxEngine(model)
    answers = engine.answers(_images(1))
    assert engine.precision == "fp16"
    assert answers.probability is not None
    assert np.ptp(answers.probability) > 0.9


def test_a_graph_without_logits_shows_no_probability() -> None:
    """Masks and verdicts come all the same."""
    answers = OnnxEngine(probe_network.unet()).answers(_images(1))
    assert answers.probability is None
    assert answers.mask.any()


def test_infinite_logits_are_not_a_probability() -> None:
    """An overflow in the network shows as NaN and does not pass for certainty."""
    model = logit_network.unet()
    logit_network.set_constant(model, "weight", np.full((1, 1, 3, 3), 3e38, np.float32))
    answers = OnnxEngine(model).answers(_images(1))
    assert answers.probability is not None
    assert np.isnan(answers.probability).any()


def test_precision_is_read_off_the_graph() -> None:
    """Stored in FP16 and cast is FP32; FP16 weights of a convolution are FP16; a quantized value makes it INT8."""
    plain, stored, half, quantized = (logit_network.unet() for _ in range(4))
    logit_network.half_stored(stored, "weight")
    logit_network.set_constant(half, "weight", logit_network.constant(half, "weight").astype(np.float16))
    quantized.graph.node.append(helper.make_node("DequantizeLinear", ["x", "scale"], ["y"]))
    assert [graph_precision(model) for model in (plain, stored, half, quantized)] == ["fp32", "fp32", "fp16", "int8"]


def _garbage(path: Path) -> None:
    path.write_bytes(b"this is no model" * 100)


def _cut(path: Path) -> None:
    path.write_bytes(logit_network.unet().SerializeToString()[:-100])


@pytest.mark.parametrize("spoil", [lambda path: None, _garbage, _cut, Path.touch, Path.mkdir])
@pytest.mark.parametrize("load", [OnnxEngine, OnnxPreprocess])
def test_a_file_that_is_no_model_is_refused_by_name(
    spoil: Callable[[Path], None], load: Callable[[Path], object], tmp_path: Path
) -> None:
    """Missing, garbage, cut off, empty, a folder: one line that names the file."""
    path = tmp_path / "model.onnx"
    spoil(path)
    with pytest.raises(ModelError) as refusal:
        load(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_onnx_runtime_refuses_is_refused_in_one_line() -> None:
    """A graph with an operator that does not exist."""
    model = logit_network.unet()
    model.graph.node[0].op_type = "Konv"
    with pytest.raises(ModelError, match=r"^candidate was refused by ONNX Runtime: [^\n]*Konv[^\n]*$"):
        OnnxEngine(model, name="candidate")


def _renamed(model: onnx.ModelProto) -> None:
    model.graph.output[1].name = "byte"


def _retyped(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT


def _resized(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 256


def _fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _surplus(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("CONTRAST", TensorProto.FLOAT, ["n"]))


def _no_input(model: onnx.ModelProto) -> None:
    del model.graph.input[:]


@pytest.mark.parametrize(
    ("break_contract", "complaint"),
    [
        (_renamed, "has no tensor LESION_PIXELS"),
        (_retyped, "has MASK as FLOAT; the contract asks for UINT8"),
        (_resized, r"has IMAGE of shape \[-1, 1, 256, 512\]"),
        (_fixed_batch, "in batches of 1 only"),
        (_surplus, "wants an input CONTRAST"),
        (_no_input, "has no tensor IMAGE"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_refused(
    break_contract: Callable[[onnx.ModelProto], None], complaint: str
) -> None:
    """Names, types, shapes and a free batch axis are asked for before anything runs."""
    model = logit_network.unet()
    break_contract(model)
    with pytest.raises(RepositoryError, match=complaint):
        OnnxEngine(model)


def test_a_batch_that_the_graph_cannot_take_is_a_clear_error() -> None:
    """A graph whose inside is made for one slice says so, by name and batch."""
    with pytest.raises(ModelError, match=r"^single failed on a batch of 2: [^\n]+$"):
        OnnxEngine(logit_network.single_slice_unet(), name="single").answers(_images(2))


def test_a_provider_that_is_not_there_is_refused() -> None:
    """ONNX Runtime alone would run on the CPU and warn."""
    with pytest.raises(ModelError, match=r"no MissingExecutionProvider; it has .*CPUExecutionProvider"):
        OnnxEngine(logit_network.unet(), providers=["MissingExecutionProvider"])


def test_preprocess_refuses_slices_of_another_type() -> None:
    """Hounsfield units come as int16."""
    with pytest.raises(ModelError, match="failed on a batch of 1"):
        OnnxPreprocess(probe_network.preprocess()).image(np.zeros((4, 4), np.float32))


@given(npst.arrays(np.float32, st.integers(1, 20), elements=st.floats(width=32)))
def test_probability_is_the_sigmoid(logits: np.ndarray) -> None:
    """It lies in 0..1, rises with the logit, is mirrored by a change of sign, and is NaN where no number is."""
    probability = probability_of(logits)
    finite = np.isfinite(logits)
    assert np.isnan(probability[~finite]).all()
    shown = probability[finite][np.argsort(logits[finite], kind="stable")]
    assert (np.diff(shown) >= 0).all()
    assert ((shown >= 0) & (shown <= 1)).all()
    np.testing.assert_allclose(probability_of(-logits)[finite], 1 - probability[finite], atol=1e-6)
    assert probability.dtype == np.float32
