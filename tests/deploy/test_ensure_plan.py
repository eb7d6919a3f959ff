"""The plan of a deployment: built when none fits, by TensorRT-RTX's real builder, and otherwise left alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

import logit_network
from groundglass import contract
from groundglass.errors import RepositoryError, SettingError
from groundglass.manifest import (
    Manifest,
    Source,
    check_digest,
    file_digest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from groundglass_export.ensure_plan import Machine, ensure_plan, misfit
from groundglass_export.gpu import Gpu
from groundglass_export.half import to_half

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has no wheel for this Python")

RUNTIME = "tensorrt_rtx"
HOPPER = Gpu("H100", "9.0", "580.1")


@pytest.fixture(scope="module")
def half() -> onnx.ModelProto:
    """A small network in FP16."""
    return to_half(logit_network.deep_unet()).model


@pytest.fixture(scope="module")
def deployment(half: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the graph, and the plan that was built of it. Shared: work on a copy."""
    folder = tmp_path_factory.mktemp("deployment")
    graph, plan = places(folder)
    write_graph(graph, half)
    plan.parent.mkdir(parents=True)
    assert ensure_plan(graph, plan, RUNTIME).startswith(f"{plan} was built for tensorrt_rtx ")
    check_digest(plan, read_manifest(plan))
    return folder


@pytest.fixture
def built(deployment: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Graph and plan, to be changed."""
    shutil.copytree(deployment, tmp_path / "deployment")
    return places(tmp_path / "deployment")


def places(folder: Path) -> tuple[Path, Path]:
    """Where graph and plan lie in a project."""
    return folder / "build" / "fp16" / "model.onnx", folder / "model_repository" / "unet" / "1" / "model.plan"


def write_graph(path: Path, model: onnx.ModelProto) -> None:
    """Graph and manifest, as ``groundglass export fp16`` leaves them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    manifest = Manifest(
        model="unet",
        file=path.name,
        model_sha256=file_digest(path),
        sources=(Source("fp32", "model.onnx", "0" * 64),),
        precision="fp16",
        opset=18,
        window_hu={"centre": contract.LUNG_WINDOW_CENTRE_HU, "width": contract.LUNG_WINDOW_WIDTH_HU},
        calibration={},
        parity={"passed": True},
        training={},
        versions={},
    )
    write_manifest(path, manifest)


def state(plan: Path) -> list[tuple[str, int, int]]:
    """Names, inodes and times of all that lies beside the plan."""
    files = sorted(plan.parent.iterdir())
    return [(file.name, file.stat().st_ino, file.stat().st_mtime_ns) for file in files]


def built_for(plan: Path, **target: object) -> None:
    """Let the manifest of a plan say something else of its target."""
    manifest = read_manifest(plan)
    write_manifest(plan, replace(manifest, target={**manifest.target, **target}))


def test_the_second_run_does_nothing(built: tuple[Path, Path]) -> None:
    """A plan that was built fits: no file is touched, with the graph or without, and none lies beside it."""
    graph, plan = built
    before = state(plan)
    assert [name for name, _, _ in before] == [plan.name, manifest_path(plan).name]
    assert ensure_plan(graph, plan, RUNTIME).endswith("left as it is")
    graph.unlink()
    assert ensure_plan(graph, plan, RUNTIME).endswith("left as it is")
    assert state(plan) == before


@pytest.mark.parametrize("damage", ["another version", "another runtime", "cut short", "no manifest", "another graph"])
def test_a_plan_that_does_not_fit_is_replaced(
    built: tuple[Path, Path], half: onnx.ModelProto, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan of another TensorRT or graph, or a damaged one, is built anew, and the reason told."""
    graph, plan = built
    if damage == "another version":
        built_for(plan, version="1.0.0.0")
    elif damage == "another runtime":
        built_for(plan, runtime="tensorrt")
    elif damage == "cut short":
        plan.write_bytes(plan.read_bytes()[:-1])
    elif damage == "no manifest":
        manifest_path(plan).unlink()
    else:
        changed = onnx.ModelProto()
        changed.CopyFrom(half)
        changed.doc_string = "another"
        write_graph(graph, changed)
    assert "was built" in ensure_plan(graph, plan, RUNTIME)
    assert f"building {plan} for tensorrt_rtx" in capsys.readouterr().err
    assert file_digest(graph) in {source.sha256 for source in read_manifest(plan).sources}
    assert ensure_plan(graph, plan, RUNTIME).endswith("left as it is")


def test_a_failed_build_leaves_the_old_plan(built: tuple[Path, Path]) -> None:
    """A graph that is not its manifest's is refused, and the plan of the old one stays."""
    graph, plan = built
    graph.write_bytes(graph.read_bytes() + b"more")
    before = state(plan)
    with pytest.raises(RepositoryError, match="is not the file of its manifest"):
        ensure_plan(graph, plan, RUNTIME)
    assert state(plan) == before


def test_another_gpu_is_a_misfit(built: tuple[Path, Path]) -> None:
    """A plan is for the compute capability that it names; a hardware-compatible one for Ampere and all later ones."""
    graph, plan = built
    machine = Machine(RUNTIME, read_manifest(plan).target["version"], HOPPER)
    for capability, compatibility, reason in (
        (["9.0"], "none", None),
        (["8.9"], "none", "the old one was built for compute capability 8.9"),
        (["8.0"], "ampere_plus", None),
        ([], "none", "the old one was built for compute capability unknown"),
    ):
        built_for(plan, compute_capabilities=capability, hardware_compatibility=compatibility)
        assert misfit(plan, graph, machine) == reason
    built_for(plan, compute_capabilities=["8.0"], hardware_compatibility="ampere_plus")
    assert misfit(plan, graph, replace(machine, gpu=Gpu("T4", "7.5", ""))) is not None


def test_a_retired_version_is_not_brought_back(built: tuple[Path, Path]) -> None:
    """Without the version's folder nothing is built, and the setting that names the version is told."""
    graph, plan = built
    retired = plan.parents[1] / "7" / plan.name
    with pytest.raises(SettingError, match=r"that version is not in the repository \(UNET_VERSION\)"):
        ensure_plan(graph, retired, RUNTIME)
    assert not retired.parent.exists()


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        (RUNTIME, "model.onnx: no such file, and there is no model.plan yet: make it with groundglass export fp16"),
        ("tensorrt", "no TensorRT is installed here"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path: Path, runtime: str, message: str) -> None:
    """As a program it ends with one line and exit code 1 where the graph or TensorRT is missing, and leaves no file."""
    command = [sys.executable, "-m", "groundglass_export.ensure_plan", "none/model.onnx", str(tmp_path / "model.plan")]
    done = subprocess.run([*command, f"--runtime={runtime}"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []
