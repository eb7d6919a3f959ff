"""The exports that start from the FP32 graph: FP16 and INT8 ONNX, each proved by the gate, with its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundglass.errors import ModelError, SettingError
from groundglass.manifest import Manifest, write_manifest
from groundglass_export.derivation import Proof, Reference, derived_manifest, place_proved
from groundglass_export.engine import OnnxPreprocess
from groundglass_export.gate import GateReport, GateScan
from groundglass_export.half import HalfSettings, to_half
from groundglass_export.int8 import Int8Settings, quantize
from groundglass_export.provenance import current_versions

HALF_PACKAGES = ("groundglass", "onnx", "nvidia-modelopt")
INT8_PACKAGES = ("groundglass", "onnx", "onnxruntime", "numpy")

RANGE_SLICES = 8
"""Slices on which FP16's range is checked; weights and activations of this network are far inside it."""

CALIBRATION_SLICES = 24
"""Slices that set INT8 ranges, spread over all that are given."""

SAME_CPU = "yes, on one kind of CPU: the ranges are measured in floating point, and the last digit of a sum differs"


def export_half(
    reference: Reference, out: Path, proof: Proof, settings: HalfSettings | None = None
) -> tuple[GateReport, Manifest]:
    """Write the FP16 graph of ``reference`` to ``out``, with its manifest, if the gate passes it.

    Value ranges are measured on slices of ``proof``. Raises ParityError, ModelError, and MissingExtra without
    nvidia-modelopt.
    """
    images = list(calibration_images(proof.preprocess, proof.scans, RANGE_SLICES))
    half = to_half(reference.model, images, settings)
    report = place_proved(half.model, out, reference, proof)
    manifest = replace(
        derived_manifest(reference.manifest, out, report),
        precision_detail=half.as_dict(),
        versions={**reference.manifest.versions, **current_versions(HALF_PACKAGES)},
    )
    return report, _write(out, manifest)


def export_int8(
    reference: Reference,
    out: Path,
    proof: Proof,
    calibration: Sequence[GateScan],
    settings: Int8Settings | None = None,
    *,
    slices: int = CALIBRATION_SLICES,
) -> tuple[GateReport, Manifest]:
    """Write the INT8 graph of ``reference`` to ``out``, with its manifest, if the gate passes it.

    ``slices`` slices, spread over the scans of ``calibration``, set the ranges. Judge it on other scans than these.
    Raises ParityError, ModelError, and SettingError for scans without slices.
    """
    images = calibration_images(proof.preprocess, calibration, slices)
    quantized = quantize(reference.model, images, settings)
    report = place_proved(quantized.model, out, reference, proof)
    manifest = replace(
        derived_manifest(reference.manifest, out, report),
        precision_detail=quantized.precision_detail(),
        quantization=quantized.quantization(),
        versions={**reference.manifest.versions, **current_versions(INT8_PACKAGES)},
        reproducible=SAME_CPU,
    )
    return report, _write(out, manifest)


def calibration_images(preprocess: Path, scans: Sequence[GateScan], count: int) -> Iterator[NDArray[np.float32]]:
    """``count`` slices spread evenly over all scans together, as the network sees them: float32 (1, 1, 512, 512).

    Fewer when the scans have fewer. Raises SettingError for scans without slices.
    """
    places = [(scan, index) for scan in scans for index in range(scan.count)]
    if not places:
        raise SettingError("there is no slice to calibrate on; name a study that has some")
    graph = OnnxPreprocess(preprocess)
    for place in np.unique(np.linspace(0, len(places) - 1, count).round().astype(int)):
        scan, index = places[place]
        yield graph.image(scan.hu(index))[None]


def _write(out: Path, manifest: Manifest) -> Manifest:
    try:
        write_manifest(out, manifest)
    except OSError as error:
        raise ModelError(f"the manifest of {out} was not written: {error}; export it again") from error
    return manifest
