"""A repository whose network is near-free, with manifests, and candidates for its next version, good and bad."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import probe_network
from groundglass import contract
from groundglass.manifest import Manifest, Source, file_digest, write_manifest
from groundglass_ensemble.embedded import EmbeddedTriton
from groundglass_ensemble.versions import Candidate, Check, Desk, Journal, ServerControl, VersionFolder, stage, verify

CALIBRATION = {"probability_threshold": 0.9, "min_lesion_pixels": probe_network.POSITIVE_PIXELS}
DANGEROUS_HU = 140
"""A slice that reaches this makes :func:`fragile_unet` fail: above what the probes hold."""


def build_repository(source: Path, target: Path) -> Path:
    """A copy of the model repository ``source`` with the probe network as version 1, and its manifest."""
    repository = probe_network.build_repository(source, target)
    describe(repository / "unet" / "1" / "model.onnx")
    return repository


def candidate(folder: Path, network: onnx.ModelProto | bytes | None = None, **manifest: Any) -> Path:
    """A model file with its manifest in a new ``folder``: by default the probe network, as FP32 made from itself."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.onnx"
    network = probe_network.unet() if network is None else network
    file.write_bytes(network if isinstance(network, bytes) else network.SerializeToString())
    return describe(file, **manifest)


def describe(file: Path, *, calibration: Mapping[str, float] = CALIBRATION, **fields: Any) -> Path:
    """Write the manifest of ``file``; its source is the probe network."""
    reference = file_digest_of(probe_network.unet())
    manifest = Manifest(
        model="unet",
        file=file.name,
        model_sha256=file_digest(file),
        sources=(Source("fp32", "model.onnx", reference),),
        precision="fp32",
        opset=18,
        window_hu={"centre": contract.LUNG_WINDOW_CENTRE_HU, "width": contract.LUNG_WINDOW_WIDTH_HU},
        calibration=calibration,
        parity={"passed": True},
        training={},
        versions={},
    )
    write_manifest(file, replace(manifest, **fields))
    return file


def file_digest_of(model: onnx.ModelProto) -> str:
    """SHA-256 of the file that a model would be."""
    return hashlib.sha256(model.SerializeToString()).hexdigest()


def other_contract() -> onnx.ModelProto:
    """The probe network with its count under another name."""
    model = probe_network.unet()
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["AREA" if name == contract.LESION_PIXELS.name else name for name in names]
    for output in model.graph.output:
        if output.name == contract.LESION_PIXELS.name:
            output.name = "AREA"
    return model


def fragile_unet() -> onnx.ModelProto:
    """The probe network, which fails on a batch that reaches :data:`DANGEROUS_HU`."""
    model = probe_network.unet()
    low = contract.LUNG_WINDOW_CENTRE_HU - contract.LUNG_WINDOW_WIDTH_HU / 2
    limit = (DANGEROUS_HU - low) / contract.LUNG_WINDOW_WIDTH_HU
    (last,) = (node for node in model.graph.node if "SLICE_POSITIVE" in node.output)
    last.output[0] = "verdict"
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(_array(limit, "float32"), "limit"),
            numpy_helper.from_array(_array([0], "int64"), "only"),
        ]
    )
    model.graph.node.extend(
        [
            helper.make_node("ReduceMax", ["IMAGE"], ["highest"], keepdims=0),
            helper.make_node("GreaterOrEqual", ["highest", "limit"], ["dangerous"]),
            helper.make_node("Cast", ["dangerous"], ["place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["only", "place"], ["zero"]),  # place 1 is none: the run fails
            helper.make_node("Cast", ["zero"], ["no"], to=TensorProto.BOOL),
            helper.make_node("Or", ["verdict", "no"], ["SLICE_POSITIVE"]),
        ]
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _array(value: Any, kind: str) -> Any:
    return np.asarray(value, dtype=kind)


def trusting(tried: Candidate) -> list[Check]:
    """A trial that finds nothing: for versions whose faults show elsewhere."""
    return []


@dataclass(frozen=True)
class Bench:
    """A repository that a real server serves."""

    repository: Path
    server: EmbeddedTriton
    control: ServerControl
    scratch: Path

    def desk(self, on_step: Callable[[str], None] = lambda step: None) -> Desk:
        """A desk at the server."""
        return Desk(VersionFolder(self.repository), Journal(self.repository, "test"), [self.control], on_step)

    def staged(self, network: onnx.ModelProto | bytes | None = None, **manifest: object) -> int:
        """A new staged version."""
        folder = self.scratch / f"candidate-{len(list(self.scratch.iterdir()))}"
        return stage(self.desk(), [candidate(folder, network, **manifest)])

    def verified(self, network: onnx.ModelProto | None = None) -> int:
        """A new version that was loaded beside the live one."""
        version = self.staged(network)
        verify(self.desk(), version, trusting)
        return version
