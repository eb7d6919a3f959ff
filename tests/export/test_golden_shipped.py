"""The shipped golden answers: the shipped version passes by them, and one with other weights or thresholds does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import logit_network
from groundglass.cli.slices import golden_scans
from groundglass.errors import ParityError
from groundglass.manifest import file_digest, read_manifest
from groundglass_export.engine import OnnxEngine, OnnxPreprocess
from groundglass_export.gate import GateReport, GateScan, require
from groundglass_export.golden import Golden, read_golden
from groundglass_export.served import verify_served

REPOSITORY = Path(__file__).parents[2] / "model_repository"
SERVED = REPOSITORY / "unet" / "1" / "model.onnx"
PREPROCESS = REPOSITORY / "preprocess" / "1" / "model.onnx"

DAMAGED_LAYER = 15
"""A pointwise convolution of the encoder. The same damage to layer 41 leaves a mean dice of 0.978 on this phantom, and
INT8 is allowed 0.98."""


@pytest.fixture(scope="module")
def golden() -> Golden:
    """What is shipped beside the versions of ``unet``."""
    return read_golden(REPOSITORY / "unet" / "golden.npz")


@pytest.fixture(scope="module")
def scans(golden: Golden) -> Iterator[list[GateScan]]:
    """The phantom that it is of, made again."""
    with golden_scans(golden, []) as made:
        yield made


def _verified(golden: Golden, scans: list[GateScan], model: Path | onnx.ModelProto, evidence: Path) -> GateReport:
    """The graph asked as a server would: windowed by the served preprocess graph, its probabilities not shown."""
    window, engine = OnnxPreprocess(PREPROCESS), OnnxEngine(model)
    return verify_served(
        golden,
        read_manifest(SERVED),
        lambda hu: replace(engine.answers(np.stack([window.image(one) for one in hu])), probability=None),
        scans,
        evidence=evidence,
    )


def test_they_are_of_the_reference_that_the_shipped_version_comes_from(golden: Golden) -> None:
    """Reference and preprocess graph are those of the repository, by digest; nothing but a phantom was recorded."""
    assert golden.reference in read_manifest(SERVED).sources
    assert golden.preprocess_sha256 == file_digest(PREPROCESS)
    (scan,) = golden.scans
    assert (scan.count, int(scan.positive.sum())) == (24, 16)
    assert scan.phantom is not None
    assert scan.phantom["lesion"] == [4, 20]


def test_they_are_of_the_graph_that_the_checkpoint_gives(golden: Golden, fp32_repository: Path) -> None:
    """The export of today gives the very file that answered."""
    fp32 = fp32_repository / "unet" / "1" / "model.onnx"
    expected, shipped = read_manifest(fp32), read_manifest(SERVED)
    if any(shipped.versions[package] != expected.versions[package] for package in ("torch", "onnx", "onnxscript")):
        pytest.skip("other versions of torch, onnx or onnxscript give other bytes")
    assert golden.reference.sha256 == file_digest(fp32)


@pytest.mark.slow
def test_the_shipped_version_passes(golden: Golden, scans: list[GateScan], tmp_path: Path) -> None:
    """INT8, through its own preprocess graph: equivalent, with the scan verdict of the reference."""
    report = _verified(golden, scans, SERVED, tmp_path)
    assert report.passed, report.as_text()
    assert report.overall.positive_slices == 16
    assert report.scans[0].candidate.positive


def _other_threshold(model: onnx.ModelProto) -> None:
    """Probability 0.9 in place of 0.4."""
    logit_network.set_constant(model, _operand(model, output="ge", operand=1), np.float32(np.log(9.0)))


def _other_verdict(model: onnx.ModelProto) -> None:
    name = _operand(model, output="SLICE_POSITIVE", operand=1)
    logit_network.set_constant(model, name, np.full_like(logit_network.constant(model, name), 10_000))


def _other_weights(model: onnx.ModelProto) -> None:
    """Half of the quantized weights of one of 85 convolutions is gone."""
    codes = [tensor for tensor in model.graph.initializer if tensor.name.endswith("/weight/codes")]
    chosen = codes[DAMAGED_LAYER]
    weights = numpy_helper.to_array(chosen).copy()
    weights[::2] = 0
    chosen.CopyFrom(numpy_helper.from_array(weights, chosen.name))


def _operand(model: onnx.ModelProto, *, output: str, operand: int) -> str:
    return next(node.input[operand] for node in model.graph.node if output in node.output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alter", "complaint"),
    [
        (_other_threshold, "change of all lesion pixels"),
        (_other_verdict, "lesion pixels that turn SLICE_POSITIVE"),
        (_other_weights, "mean dice of positive slices"),
    ],
)
def test_an_altered_version_fails(
    alter: Callable[[onnx.ModelProto], None], complaint: str, golden: Golden, scans: list[GateScan], tmp_path: Path
) -> None:
    """Another threshold, another least count, half a layer gone: each is refused by the figure that shows it."""
    model = onnx.load(SERVED)
    alter(model)
    report = _verified(golden, scans, model, tmp_path)
    assert complaint in "; ".join(found.figure for found in report.complaints)
    with pytest.raises(ParityError, match=r"Worst slice: phantom slice \d+"):
        require(report)
