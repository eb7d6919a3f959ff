"""`groundglass export`: what passes the gate is written with its manifest, what fails leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import onnx
import pytest

import logit_network
import probe_network
from command import assert_one_clear_line, groundglass
from groundglass.manifest import Manifest, Source, check_digest, file_digest, read_manifest, write_manifest
from groundglass_client.phantom import PhantomSettings
from groundglass_export.golden import read_golden

THRESHOLDS = {
    "probability_threshold": logit_network.PROBABILITY_THRESHOLD,
    "min_lesion_pixels": logit_network.MIN_LESION_PIXELS,
}
PNG_SIGNATURE = b"\x89PNG"


def _placed(model: onnx.ModelProto, path: Path, name: str, calibration: dict[str, float]) -> Path:
    """A model file with the manifest that an FP32 export writes."""
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    manifest = Manifest(
        model=name,
        file=path.name,
        model_sha256=file_digest(path),
        sources=(Source("checkpoint", "unet.safetensors", "ab" * 32),),
        precision="fp32",
        opset=model.opset_import[0].version,
        window_hu={"centre": -600.0, "width": 1500.0},
        calibration=calibration,
        parity={},
        training={},
        versions={},
    )
    write_manifest(path, manifest)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of a small network in FP32; the path of its unet. Shared: don't change it."""
    repository = tmp_path_factory.mktemp("fp32")
    _placed(probe_network.preprocess(), repository / "preprocess" / "1" / "model.onnx", "preprocess", {})
    return _placed(logit_network.deep_unet(), repository / "unet" / "1" / "model.onnx", "unet", THRESHOLDS)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom of 16 slices on disk."""
    out = tmp_path_factory.mktemp("phantom") / "study"
    assert groundglass("phantom", "--slices", "16", "--lesion", "2:14", "--out", out).returncode == 0
    return out


@pytest.fixture(scope="module")
def half(reference: Path, study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP16 graph of the small network, exported by the command. Shared: don't change it."""
    out = tmp_path_factory.mktemp("fp16") / "model.onnx"
    done = groundglass("export", "fp16", "--model", reference, "--out", out, "--study", study, "--evidence", out.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["equivalent", str(out)]
    return out


def test_fp16_is_written_with_its_proof(half: Path, reference: Path) -> None:
    """The manifest names the checkpoint and the FP32 graph, what stayed FP32, and the figures of the comparison."""
    manifest = read_manifest(half)
    check_digest(half, manifest)
    assert manifest.sources[1:] == (Source("fp32", "model.onnx", file_digest(reference)),)
    assert (manifest.precision, manifest.precision_detail["convolutions_fp16"]) == ("fp16", 13)
    assert manifest.calibration == THRESHOLDS
    assert manifest.parity["passed"]
    assert manifest.parity["slices"] == 16
    assert json.loads((half.parent / "parity.json").read_text())["passed"]
    assert (half.parent / "worst_slice.png").read_bytes().startswith(PNG_SIGNATURE)


def test_the_same_export_gives_the_same_bytes(half: Path, reference: Path, study: Path, tmp_path: Path) -> None:
    """A second run, in another process: graph and manifest are the same, byte for byte."""
    out = tmp_path / "model.onnx"
    done = groundglass("export", "fp16", "--model", reference, "--out", out, "--study", study, "--evidence", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("model.onnx", "model.onnx.manifest.json"):
        assert (tmp_path / name).read_bytes() == (half.parent / name).read_bytes()


def test_int8_is_written_with_its_proof(reference: Path, study: Path, tmp_path: Path) -> None:
    """The manifest says what set the ranges, how many slices did, and what stayed in float; the gate passed it."""
    out = tmp_path / "model.onnx"
    command = ["export", "int8", "--model", reference, "--out", out, "--calibrate", study, "--slices", "4"]
    done = groundglass(*command, "--study", study, "--evidence", tmp_path / "evidence")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out)
    check_digest(out, manifest)
    assert manifest.precision == "int8"
    assert manifest.precision_detail["convolutions_int8"] == 11
    assert manifest.quantization["slices"] == 4
    assert len(manifest.quantization["images_sha256"]) == 64
    assert manifest.parity["passed"]
    assert manifest.calibration == THRESHOLDS


def test_a_plan_is_built_and_a_plan_of_the_fp32_graph_is_refused(half: Path, reference: Path, tmp_path: Path) -> None:
    """TensorRT-RTX builds the FP16 graph without a GPU; asked for FP16, the FP32 graph leaves no plan."""
    pytest.importorskip("tensorrt_rtx_bindings")
    plan, cheat = tmp_path / "model.plan", tmp_path / "cheat.plan"
    done = groundglass("export", "tensorrt", "--model", half, "--out", plan, "--batch", "1:4:8")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(plan)
    check_digest(plan, manifest)
    assert dict(manifest.profile) == {"min": 1, "opt": 4, "max": 8}
    assert manifest.target["runtime"] == "tensorrt_rtx"
    assert [source.role for source in manifest.sources] == ["checkpoint", "fp32", "fp16"]
    assert not manifest.parity["passed"]
    assert manifest.reproducible.startswith("no: ")
    refused = groundglass("export", "tensorrt", "--model", reference, "--out", cheat)
    assert_one_clear_line(refused, "not FP16", "Build it from the FP16 graph")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.plan", "model.plan.manifest.json"]


def test_verify_passes_an_equal_candidate_and_records_it(
    half: Path, reference: Path, study: Path, tmp_path: Path
) -> None:
    """The report is printed, as JSON when asked, and its figures go into the manifest when asked."""
    folder = Path(shutil.copytree(half.parent, tmp_path / "candidate"))
    command = ["export", "verify", "--model", reference, "--candidate", folder / "model.onnx", "--study", study]
    done = groundglass(*command, "--evidence", tmp_path / "evidence", "--json", "--record")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"]
    assert read_manifest(folder / "model.onnx").parity["slices_sha256"] == report["slices_sha256"]


def test_golden_answers_are_recorded(reference: Path, study: Path, tmp_path: Path) -> None:
    """Of a study, or of a phantom whose settings are kept in full; the same again gives the same bytes."""
    command = ["export", "golden", "--model", reference, "--out"]
    done = groundglass(*command, tmp_path / "study.npz", "--study", study)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["study: 16 slices, 16 positive", str(tmp_path / "study.npz")]
    assert read_golden(tmp_path / "study.npz").scans[0].phantom is None
    for name in ("one.npz", "other.npz"):
        assert groundglass(*command, tmp_path / name).returncode == 0
    golden = read_golden(tmp_path / "one.npz")
    assert golden.scans[0].phantom == {**asdict(PhantomSettings(slices=24)), "lesion": [4, 20]}
    assert golden.reference == read_manifest(reference).as_source()
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()


def test_verify_fails_a_damaged_candidate_with_a_picture(reference: Path, study: Path, tmp_path: Path) -> None:
    """A network with another bias: exit code 1, the worst slice named, a picture of it, and nothing recorded."""
    damaged = logit_network.unet()
    logit_network.set_constant(damaged, "bias", logit_network.constant(damaged, "bias") + 12)
    candidate = tmp_path / "damaged.onnx"
    onnx.save(damaged, candidate)
    evidence = tmp_path / "evidence"
    command = ["export", "verify", "--model", reference, "--candidate", candidate, "--study", study]
    done = groundglass(*command, "--evidence", evidence)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "damaged.onnx" in line
    assert "is not equivalent" in line
    assert "Worst slice: study slice" in line
    assert str(evidence / "worst_slice.png") in line
    assert (evidence / "worst_slice.png").read_bytes().startswith(PNG_SIGNATURE)
    assert not json.loads((evidence / "parity.json").read_text())["passed"]


def test_a_failed_export_leaves_the_old_file(reference: Path, study: Path, tmp_path: Path) -> None:
    """A reference whose own answers contradict its manifest proves nothing: no file is written, the old one stays."""
    repository = Path(shutil.copytree(reference.parents[2], tmp_path / "repository"))
    shutil.rmtree(repository / "unet" / "1")
    model = _placed(logit_network.unet(), repository / "unet" / "1" / "model.onnx", "unet", THRESHOLDS | {
        "probability_threshold": 0.3
    })  # fmt: skip
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    out.write_bytes(b"the old one")
    done = groundglass("export", "fp16", "--model", model, "--out", out, "--study", study, "--evidence", tmp_path / "e")
    assert_one_clear_line(done, "not equivalent")
    assert out.read_bytes() == b"the old one"
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fp16", "--model", "nowhere.onnx", "--out", "x.onnx"], ["nowhere.onnx", "no such file"]),
        (["fp16", "--model", "{reference}", "--out", "{reference}"], ["is the reference itself"]),
        (["fp16", "--model", "{reference}", "--out", "x.onnx", "--keep-fp32", "conv9"], ["conv9"]),
        (["fp16", "--model", "{reference}", "--out", "x.onnx", "--preprocess", "no.onnx"], ["no.onnx"]),
        (["fp16", "--model", "{reference}", "--out", "x.onnx", "--study", "{reference}"], ["model.onnx"]),
        (["fp16", "--model", "{half}", "--out", "x.onnx"], ["in fp16; expected unet in fp32"]),
        (["int8", "--model", "{reference}", "--out", "x.onnx", "--calibrate", "nowhere"], ["nowhere"]),
        (["int8", "--model", "{reference}", "--out", "x.onnx", "--headroom", "0.5"], ["headroom is 0.5"]),
        (["int8", "--model", "{reference}", "--out", "x.onnx", "--keep-float", "conv9"], ["conv9"]),
        (["tensorrt", "--model", "nowhere.onnx", "--out", "x.plan"], ["nowhere.onnx", "no such file"]),
        (["tensorrt", "--model", "{half}", "--out", "x.plan", "--batch", "16"], ["--batch 16", "MIN:OPT:MAX"]),
        (["tensorrt", "--model", "{half}", "--out", "x.plan", "--batch", "8:4:2"], ["batch profile 8:4:2"]),
        (["tensorrt", "--model", "{half}", "--out", "x.plan", "--runtime", "onnx"], ["onnx", "auto"]),
        (["verify", "--model", "{reference}", "--candidate", "nowhere.plan"], ["nowhere.plan", "no such file"]),
        (["golden", "--model", "{half}", "--out", "x.npz"], ["in fp16; expected unet in fp32"]),
        (["golden", "--model", "{reference}", "--out", "x.npz", "--preprocess", "no.onnx"], ["no.onnx"]),
        (["golden", "--model", "{reference}", "--out", "x.npz", "--study", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_input_gives_one_clear_line(
    arguments: list[str], words: list[str], reference: Path, half: Path, study: Path, tmp_path: Path
) -> None:
    """Missing files, wrong precisions, unusable options: one line that names them, and no file written."""
    filled = [part.format(reference=reference, half=half) for part in arguments]
    filled = [str(tmp_path / part) if part.startswith("x.") else part for part in filled]
    if arguments[0] not in ("tensorrt", "golden"):
        filled += ["--evidence", str(tmp_path / "evidence")]
    if arguments[0] != "tensorrt":
        filled += [] if "--study" in filled else ["--study", str(study)]
    assert_one_clear_line(groundglass("export", *filled), *words)
    assert not list(tmp_path.glob("x.*"))


def test_a_changed_reference_is_refused(reference: Path, study: Path, tmp_path: Path) -> None:
    """A reference that is not its manifest's file proves nothing."""
    repository = Path(shutil.copytree(reference.parents[2], tmp_path / "repository"))
    model = repository / "unet" / "1" / "model.onnx"
    model.write_bytes(model.read_bytes() + b"\0")
    done = groundglass("export", "fp16", "--model", model, "--out", tmp_path / "x.onnx", "--study", study)
    assert_one_clear_line(done, "model.onnx is not the file of its manifest")


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit (util-linux) limits the size of files")
@pytest.mark.parametrize("command", ["int8", "tensorrt"])
def test_a_full_disk_leaves_the_old_file(
    command: str, reference: Path, half: Path, study: Path, tmp_path: Path
) -> None:
    """Writing fails in the middle of the file: one line that names it, the old file whole, nothing beside it."""
    out = tmp_path / "model"
    out.write_bytes(b"the old one")
    arguments = ["--model", half if command == "tensorrt" else reference, "--out", out]
    if command == "int8":
        arguments += ["--study", study, "--calibrate", study, "--slices", "1", "--evidence", tmp_path / "evidence"]
    done = groundglass("export", command, *arguments, largest_file_bytes=1000)
    assert_one_clear_line(done, f"{out} was not written", "File too large")
    assert out.read_bytes() == b"the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
