"""A model derived from the FP32 one is proved beside its final place, and takes it only when it is equivalent.

Convert, write beside, run the gate on the file as written, rename, manifest: nothing that failed is ever left where a
server could load it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from groundglass.contract import PREPROCESS, UNET
from groundglass.errors import ModelError, ParityError, SettingError
from groundglass.manifest import Manifest, check_digest, file_digest, manifest_path, read_manifest, write_manifest
from groundglass.publish import published
from groundglass_export.answers import Engine
from groundglass_export.calibration import Calibration
from groundglass_export.engine import OnnxEngine, OnnxPreprocess, load_model
from groundglass_export.gate import Comparison, GateReport, GateScan, require, same_decision, verify
from groundglass_export.gate.evidence import PICTURE_FILE, write_evidence

PLAN_SUFFIXES = (".plan", ".engine")


@dataclass(frozen=True, slots=True)
class Proof:
    """What a candidate is compared on, and where the evidence goes.

    ``folder`` receives ``parity.json`` and, of the worst slice, ``worst_slice.png``. ``progress`` is called with slices
    done and slices in all.
    """

    preprocess: Path
    scans: Sequence[GateScan]
    folder: Path
    progress: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True, slots=True)
class Reference:
    """The FP32 graph that everything is compared with."""

    path: Path
    model: onnx.ModelProto
    manifest: Manifest

    @property
    def calibration(self) -> Calibration:
        """The thresholds that it decides by."""
        return same_decision(self.manifest, self.manifest)


def read_reference(path: Path) -> Reference:
    """An FP32 ``unet`` graph as ``groundglass export onnx`` wrote it.

    Raises RepositoryError when the file is missing, has no manifest or is not its manifest's, and ModelError when it is
    no ``unet`` in FP32.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected the FP32 model.onnx that groundglass export onnx writes")
    manifest = read_manifest(path)
    check_digest(path, manifest)
    if (manifest.model, manifest.precision) != (UNET.name, "fp32"):
        raise ModelError(f"{path} is {manifest.model} in {manifest.precision}; expected {UNET.name} in fp32")
    return Reference(path, load_model(path), manifest)


def preprocess_of(reference: Path) -> Path:
    """The ``preprocess`` graph of the repository that ``reference`` lies in: ``<repository>/unet/<n>/model.onnx``.

    Raises SettingError where there is none.
    """
    found = reference.resolve().parents[2] / PREPROCESS.name / "1" / "model.onnx"
    if not found.is_file():
        raise SettingError(f"no preprocess graph at {found}, where that of {reference} should be; name one")
    return found


def engine_of(path: Path) -> Engine:
    """What runs a file: ONNX Runtime on the CPU for ``.onnx``, TensorRT on the GPU for ``.plan``.

    Raises ModelError and RepositoryError when the file can't be run here.
    """
    if path.suffix in PLAN_SUFFIXES:
        from groundglass_export.plan_engine import PlanEngine

        return PlanEngine(path)
    return OnnxEngine(path)


def verify_file(reference: Reference, candidate: Path, proof: Proof, *, name: str | None = None) -> GateReport:
    """Compare the file ``candidate`` with the reference and write the evidence; the report may say that it failed.

    A candidate with a manifest must be its manifest's file and state the reference's thresholds. Raises
    RepositoryError, ModelError, and ParityError when nothing can be compared.
    """
    if not candidate.is_file():
        raise ModelError(f"{candidate}: no such file; expected a .onnx or .plan of {UNET.name}")
    calibration = reference.calibration
    if manifest_path(candidate).exists():
        manifest = read_manifest(candidate)
        check_digest(candidate, manifest)
        calibration = same_decision(reference.manifest, manifest)
    engine = OnnxEngine(candidate, name=name) if name is not None else engine_of(candidate)
    comparison = Comparison(OnnxEngine(reference.path), engine, OnnxPreprocess(proof.preprocess), proof.scans)
    report = verify(comparison, calibration=calibration, progress=proof.progress)
    write_evidence(report, comparison, proof.folder)
    return report


def place_proved(model: onnx.ModelProto, out: Path, reference: Reference, proof: Proof) -> GateReport:
    """Write ``model`` to ``out`` if the gate passes it as it lies on disk; else raise ParityError and leave no trace.

    The manifest is the caller's, who knows how the model was made: until it is written, that of an older file at
    ``out`` does not match, and both are refused.

    Raises SettingError when ``out`` is the reference itself, ModelError when it can't be written.
    """
    if out.resolve() == reference.path.resolve():
        raise SettingError(f"{out} is the reference itself; write the candidate to another file")
    try:
        with published(out) as beside:
            beside.write_bytes(model.SerializeToString(deterministic=True))
            report = verify_file(reference, beside, proof, name=out.name)
            require(report, proof.folder / PICTURE_FILE)
    except OSError as error:
        raise ModelError(f"{out} was not written: {error}") from error
    return report


def derived_manifest(reference: Manifest, file: Path, parity: GateReport) -> Manifest:
    """The part of a candidate's manifest that comes from its reference, its file and its proof."""
    return replace(
        reference,
        file=file.name,
        model_sha256=file_digest(file),
        sources=(*reference.sources, reference.as_source()),
        precision=parity.candidate.precision,
        precision_detail={},
        parity=parity.as_dict(),
    )


def record_parity(candidate: Path, report: GateReport) -> Path:
    """Put the figures of a passed comparison into the candidate's manifest; gives the manifest's path.

    Raises ParityError for a report that did not pass, RepositoryError without a manifest.
    """
    if not report.passed:
        raise ParityError(f"{candidate} did not pass; its manifest is left as it is")
    return write_manifest(candidate, replace(read_manifest(candidate), parity=report.as_dict()))
