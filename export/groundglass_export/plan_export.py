"""The export that ends in a TensorRT plan: built, its precision proved from the finished plan, then put in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from groundglass.errors import ModelError, SettingError
from groundglass.manifest import Manifest, check_digest, file_digest, read_manifest, write_manifest
from groundglass_export.plan import Plan, PlanSettings, build_plan, write_plan
from groundglass_export.plan_inspection import require_precision
from groundglass_export.provenance import current_versions

PLAN_PACKAGES = ("groundglass", "onnx")
NOT_COMPARED = "not compared yet: groundglass export verify --record does so on a machine that runs the plan"


def export_plan(
    model: Path,
    out: Path,
    settings: PlanSettings | None = None,
    *,
    precision: str = "fp16",
    progress: Callable[[str, float], None] = lambda phase, share: None,
) -> tuple[Plan, Manifest]:
    """Build a plan of the graph at ``model``, require its ``precision``, and write it with its manifest to ``out``.

    Raises ParityError for a plan of another precision (that of an FP32 graph, when FP16 is asked for), RepositoryError
    for a graph without a manifest or of another digest, and what ``build_plan`` raises. Nothing is written then.
    """
    if not model.is_file():
        raise ModelError(f"{model}: no such file; expected the .onnx that groundglass export fp16 writes")
    if out.resolve() == model.resolve():
        raise SettingError(f"{out} is the graph itself; write the plan to another file")
    origin = read_manifest(model)
    check_digest(model, origin)
    plan = build_plan(model, settings, progress)
    require_precision(plan.precision, precision, origin.precision_detail.get("kept_fp32", ()))
    write_plan(plan, out)
    manifest = _manifest(origin, plan, out, precision)
    try:
        write_manifest(out, manifest)
    except OSError as error:
        raise ModelError(f"the manifest of {out} was not written: {error}; export it again") from error
    return plan, manifest


def _manifest(origin: Manifest, plan: Plan, out: Path, precision: str) -> Manifest:
    return replace(
        origin,
        file=out.name,
        model_sha256=file_digest(out),
        sources=(*origin.sources, origin.as_source()),
        precision=precision,
        precision_detail={**plan.precision.as_dict(), "widened_inputs": list(plan.widened_inputs)},
        profile=plan.profile,
        target=plan.target,
        parity={"passed": False, "notes": [NOT_COMPARED]},
        versions={**origin.versions, **current_versions(PLAN_PACKAGES), plan.runtime: plan.version},
        reproducible=plan.reproducible,
    )
