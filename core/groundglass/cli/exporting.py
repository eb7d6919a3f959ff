"""`groundglass export`: a checkpoint becomes models that are proved before they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from groundglass.cli.slices import opened_scans, recorded_phantoms
from groundglass.cli.terminal import extra, increments, phases, progress
from groundglass.errors import SettingError

if TYPE_CHECKING:
    from groundglass_export.derivation import Proof, Reference
    from groundglass_export.gate import GateScan

PHANTOM_HEADROOM: Final = 1.5
"""A phantom varies less than patients do. Measured with P001 unseen: mean dice against FP32 0.987, with 1.0 less."""

export_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Turn a checkpoint into served models.")

Fp32Model = Annotated[Path, typer.Option("--model", help="FP32 unet graph that export onnx wrote: the reference.")]
Studies = Annotated[
    list[Path],
    typer.Option("--study", help="CT study to compare on; repeat for several. Default: a phantom of 24 slices."),
]
Evidence = Annotated[Path, typer.Option(help="Folder for parity.json and a picture of the worst slice.")]
PreprocessGraph = Annotated[
    Path | None, typer.Option("--preprocess", help="Preprocess graph. Default: that of the reference's repository.")
]


@export_app.command(
    "onnx", epilog="Example: groundglass export onnx --checkpoint unet.safetensors --out model_repository"
)
def export_onnx(
    checkpoint: Annotated[Path, typer.Option(help="Trained U-Net: .safetensors, or a .pt/.pth of tensors only.")],
    out: Annotated[Path, typer.Option(help="Model repository to write preprocess/1 and unet/1 into.")],
) -> None:
    """Write the preprocess and unet graphs as ONNX FP32, checked against torch, each with its manifest."""
    with extra("export"):
        from groundglass_export import onnx_export
    for model_file in onnx_export.export_onnx(checkpoint, out):
        print(model_file)


@export_app.command(
    "fp16", epilog="Example: groundglass export fp16 --model build/unet/1/model.onnx --out build/fp16/model.onnx"
)
def export_fp16(
    model: Fp32Model,
    out: Annotated[Path, typer.Option(help="FP16 graph to write: what a TensorRT plan is built from.")],
    study: Studies = [],  # noqa: B006  typer copies it
    evidence: Evidence = Path("out/parity"),
    preprocess: PreprocessGraph = None,
    keep_fp32: Annotated[list[str], typer.Option(help="Name of a node that shall stay FP32; repeat for several.")] = [],  # noqa: B006
) -> None:
    """Cast the FP32 graph to FP16 and write it if the parity gate finds it equivalent."""
    with extra("export"):
        from groundglass_export.conversions import export_half
        from groundglass_export.half import HalfSettings
    with _proof(model, study, evidence, preprocess) as (reference, proof):
        report, _ = export_half(reference, out, proof, HalfSettings(keep_fp32=tuple(keep_fp32)))
    print(report.as_text())
    print(out)


@export_app.command(
    "int8",
    epilog="Example: groundglass export int8 --model unet/1/model.onnx --calibrate scan1/ --study scan2/ --out x.onnx",
)
def export_int8(
    model: Fp32Model,
    out: Annotated[Path, typer.Option(help="INT8 graph to write, for CPUs.")],
    calibrate: Annotated[
        list[Path], typer.Option(help="CT study whose slices set the ranges; repeat for several. Default: a phantom.")
    ] = [],  # noqa: B006
    slices: Annotated[int, typer.Option(min=1, help="Slices to calibrate on, spread over these studies.")] = 24,
    study: Studies = [],  # noqa: B006
    evidence: Evidence = Path("out/parity"),
    preprocess: PreprocessGraph = None,
    keep_float: Annotated[
        list[str], typer.Option(help="Name of a convolution that shall stay in float; repeat for several.")
    ] = [],  # noqa: B006
    headroom: Annotated[
        float | None, typer.Option(help="Ranges are this many times what was seen. Default: 1, for a phantom 1.5.")
    ] = None,
    vnni_only: Annotated[
        bool, typer.Option("--vnni-only", help="All 8 bits of every weight: wrong on CPUs without VNNI.")
    ] = False,
) -> None:
    """Quantize the FP32 graph to INT8 and write it if the parity gate finds it equivalent."""
    with extra("export"):
        from groundglass_export.conversions import export_int8
        from groundglass_export.int8 import Int8Settings
    if headroom is None:
        headroom = 1.0 if calibrate else PHANTOM_HEADROOM
    settings = Int8Settings(vnni_only=vnni_only, headroom=headroom, keep_float=tuple(keep_float))
    with _proof(model, study, evidence, preprocess) as (reference, proof), opened_scans(calibrate) as calibration:
        report, _ = export_int8(reference, out, proof, calibration, settings, slices=slices)
    print(report.as_text())
    print(out)


@export_app.command(
    "tensorrt",
    epilog="Example: groundglass export tensorrt --model build/fp16/model.onnx --out build/unet/1/model.plan",
)
def export_tensorrt(
    model: Annotated[Path, typer.Option(help="FP16 graph that export fp16 wrote.")],
    out: Annotated[Path, typer.Option(help="Plan to write. Build it inside the container that will serve it.")],
    batch: Annotated[str, typer.Option(metavar="MIN:OPT:MAX", help="Smallest, usual and largest batch.")] = "1:16:64",
    runtime: Annotated[
        str, typer.Option(help="tensorrt, tensorrt_rtx, or auto: the first that is installed.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="What the plan must turn out to be: fp16 or fp32.")] = "fp16",
    compute_capability: Annotated[
        list[str], typer.Option(help="GPU to build for, such as 8.9; TensorRT-RTX only; repeat for several.")
    ] = [],  # noqa: B006
    timing_cache: Annotated[
        Path | None, typer.Option(help="File that makes the next build faster; TensorRT only.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Runs under later TensorRT versions too, at some cost.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="Runs on later GPUs too, at some cost; TensorRT only.")
    ] = False,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0 builds fastest, 5 searches longest. Default: the builder's own.")
    ] = None,
    workspace_mib: Annotated[int | None, typer.Option(min=1, help="Memory that a layer may use, MiB.")] = None,
) -> None:
    """Build a strongly typed TensorRT plan and write it if its layers have the precision asked for."""
    with extra("tensorrt"):
        from groundglass_export.plan import PlanSettings
        from groundglass_export.plan_export import export_plan
    settings = PlanSettings(
        runtime=runtime,
        batch=_profile(batch),
        compute_capabilities=tuple(compute_capability),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        workspace_bytes=None if workspace_mib is None else workspace_mib << 20,
        optimization_level=optimization_level,
        timing_cache=timing_cache,
    )
    with phases("building") as show:
        plan, _ = export_plan(model, out, settings, precision=precision, progress=show)
    found = plan.precision
    print(
        f"{plan.runtime} {plan.version}: {found.share_fp16:.1%} of {found.layers} layers FP16, "
        f"{found.convolutions - len(found.other_convolutions)} of {found.convolutions} convolutions FP16 "
        f"({found.source}), {found.engine_bytes / 1e6:.1f} MB"
    )
    print(out)


def _profile(text: str) -> tuple[int, int, int]:
    """``1:16:64`` -> (1, 16, 64). Raises SettingError."""
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise SettingError(f"--batch {text}: expected MIN:OPT:MAX, three whole numbers such as 1:16:64")
    smallest, usual, largest = map(int, parts)
    return smallest, usual, largest


@export_app.command("verify", epilog="Example: groundglass export verify --model build/unet/1/model.onnx --candidate x")
def verify(
    model: Fp32Model,
    candidate: Annotated[Path, typer.Option(help="The .onnx or .plan to compare with it.")],
    study: Studies = [],  # noqa: B006
    evidence: Evidence = Path("out/parity"),
    preprocess: PreprocessGraph = None,
    record: Annotated[bool, typer.Option("--record", help="Put the figures into the candidate's manifest.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare a candidate with the FP32 reference: masks, lesion pixels, verdicts. Fails when it is not equivalent."""
    with extra("export"):
        from groundglass_export.derivation import record_parity, verify_file
        from groundglass_export.gate import require
        from groundglass_export.gate.evidence import PICTURE_FILE
    with _proof(model, study, evidence, preprocess) as (reference, proof):
        report = verify_file(reference, candidate, proof)
    print(json.dumps(report.to_json(), indent=2) if json_out else report.as_text())
    require(report, evidence / PICTURE_FILE)
    if record:
        record_parity(candidate, report)


@export_app.command(
    "golden", epilog="Example: groundglass export golden --model build/unet/1/model.onnx --out build/golden.npz"
)
def export_golden(
    model: Fp32Model,
    out: Annotated[Path, typer.Option(help="File of golden answers to write.")],
    study: Annotated[
        list[Path],
        typer.Option("--study", help="CT study to answer; repeat for several. Default: a phantom of 24 slices."),
    ] = [],  # noqa: B006
    preprocess: PreprocessGraph = None,
) -> None:
    """Record what the FP32 reference says of scans, so that a served version can be held to it without the reference.

    The file holds no pixels. The phantom is made again where a version is judged; studies have to be given again there.
    """
    with extra("export"):
        from groundglass_export.derivation import preprocess_of, read_reference
        from groundglass_export.golden_recording import record_golden
    reference = read_reference(model)
    graph = preprocess or preprocess_of(model)
    with opened_scans(study) as scans, progress("recording", _slices(scans)) as advance:
        golden = record_golden(reference, graph, scans, out, phantoms=recorded_phantoms(study), progress=_done(advance))
    for scan in golden.scans:
        print(f"{scan.name}: {scan.count} slices, {int(scan.positive.sum())} positive")
    print(out)


@contextmanager
def _proof(
    model: Path, studies: list[Path], evidence: Path, preprocess: Path | None
) -> Iterator[tuple[Reference, Proof]]:
    """The reference, and the slices to compare on with a progress bar over them."""
    from groundglass_export.derivation import Proof, preprocess_of, read_reference

    reference = read_reference(model)
    with opened_scans(studies) as scans, progress("comparing", _slices(scans)) as advance:
        yield reference, Proof(preprocess or preprocess_of(model), scans, evidence, _done(advance))


def _slices(scans: list[GateScan]) -> int:
    return sum(scan.count for scan in scans)


def _done(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    show = increments(advance)
    return lambda done, total: show(done)
