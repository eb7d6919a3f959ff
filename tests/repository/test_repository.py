"""The reviewed configs keep the tensor contract, and a change that breaks it is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from groundglass import contract
from groundglass.errors import RepositoryError
from groundglass.manifest import Manifest, file_digest, write_manifest
from groundglass_ensemble.repository import check_repository, config_file, find_problems, read_config

REPOSITORY = Path(__file__).parents[2] / "model_repository"
VARIANTS = pytest.mark.parametrize("config_name", [None, "cpu"], ids=["production", "cpu"])


@VARIANTS
def test_the_reviewed_configs_keep_the_contract(config_name: str | None) -> None:
    """Names, types, dims, batch sizes and ensemble edges of every config are those of the contract."""
    assert find_problems(REPOSITORY, config_name, model_files=False) == []


def test_production_runs_on_the_gpu_and_the_variant_on_the_cpu() -> None:
    """The network is a TensorRT plan on a GPU in production, and an ONNX graph without a GPU in the CPU variant."""
    production = read_config(config_file(REPOSITORY / "unet", None))
    variant = read_config(config_file(REPOSITORY / "unet", "cpu"))
    gpu, cpu = production.instance_group[0], variant.instance_group[0]
    assert (production.backend, production.default_model_filename) == ("tensorrt", "model.plan")
    assert (variant.backend, variant.default_model_filename) == ("onnxruntime", "model.onnx")
    assert (gpu.kind, cpu.kind) == (gpu.KIND_GPU, cpu.KIND_CPU)
    assert production.model_warmup
    assert production.HasField("dynamic_batching")


def test_the_aggregator_carries_the_papers_rule() -> None:
    """Fifteen consecutive positive slices make a scan positive, as a parameter of the config."""
    config = read_config(REPOSITORY / "scan_aggregator" / "config.pbtxt")
    assert config.parameters[contract.RUN_PARAMETER].string_value == str(contract.POSITIVE_RUN)


def test_a_complete_repository_is_accepted(probe_repository: Path) -> None:
    """A repository with all its files can be served."""
    check_repository(probe_repository, "cpu")


@pytest.mark.parametrize(
    ("model", "old", "new", "words"),
    [
        ("unet", "TYPE_BOOL", "TYPE_UINT8", "SLICE_POSITIVE has data_type UINT8"),
        ("unet", "[ 512, 64 ]", "[ 64, 512 ]", r"MASK has dims \[64, 512\]"),
        ("unet", '"LESION_PIXELS"', '"PIXELS"', "outputs are"),
        ("unet", "max_batch_size: 64", "max_batch_size: 8", "max_batch_size is 8"),
        ("unet", 'name: "unet"', 'name: "net"', "name is 'net'"),
        ("unet", "input [", "inputs [", "no Triton model config"),
        ("preprocess", "[ -1, -1 ]", "[ 512, 512 ]", "HU has dims"),
        ("ct_scan", 'value: "verdict"', 'value: "elsewhere"', "reads SLICE_POSITIVE from 'elsewhere'"),
        ("ct_scan", 'model_name: "preprocess"', 'model_name: "unet"', "ensemble steps are"),
        ("ct_scan", 'output_map { key: "MASK" value: "MASK" }', "", "step unet maps"),
        ("scan_aggregator", "count: 1", "count: 2", "one instance"),
        ("scan_aggregator", "study_ttl_s", "ttl", "parameter study_ttl_s is missing"),
    ],
)
def test_a_broken_config_is_named(
    probe_repository: Path, tmp_path: Path, model: str, old: str, new: str, words: str
) -> None:
    """Each way to break a config is reported with its model and field."""
    copy = Path(shutil.copytree(probe_repository, tmp_path / "repository"))
    file = config_file(copy / model, "cpu")
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(RepositoryError, match=rf"{model}: .*{words}"):
        check_repository(copy, "cpu")


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("unet/1/model.onnx", "unet: version 1 has no file model.onnx"),
        ("scan_aggregator/1/model.py", "scan_aggregator: version 1 has no file model.py"),
        ("ct_scan/1", "ct_scan: .* has no version folder"),
        ("preprocess/config.pbtxt", None),
        ("ct_scan/config.pbtxt", "ct_scan: .*No such file"),
    ],
)
def test_a_missing_file_is_named(probe_repository: Path, tmp_path: Path, lost: str, words: str | None) -> None:
    """A lost model file, version or config is reported; a production config is not needed where a variant is."""
    copy = Path(shutil.copytree(probe_repository, tmp_path / "repository"))
    path = copy / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if words is None:
        check_repository(copy, "cpu")
        return
    with pytest.raises(RepositoryError, match=words):
        check_repository(copy, "cpu")


def _with_manifest(probe_repository: Path, copy: Path, model: str = "unet") -> Path:
    """A copy of the repository whose network has a manifest that calls it ``model``; the path of the network."""
    path = Path(shutil.copytree(probe_repository, copy)) / "unet" / "1" / "model.onnx"
    manifest = Manifest(
        model=model,
        file=path.name,
        model_sha256=file_digest(path),
        sources=(),
        precision="fp32",
        opset=20,
        window_hu={},
        calibration={},
        parity={},
        training={},
        versions={},
    )
    write_manifest(path, manifest)
    return path


def test_a_model_that_is_not_its_manifests_is_refused(probe_repository: Path, tmp_path: Path) -> None:
    """A file with its own manifest is accepted; one more byte in it, and it is refused by name."""
    path = _with_manifest(probe_repository, tmp_path / "repository")
    check_repository(tmp_path / "repository", "cpu")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(RepositoryError, match=r"unet: .*model\.onnx is not the file of its manifest: SHA-256"):
        check_repository(tmp_path / "repository", "cpu")


def test_the_manifest_of_another_model_is_refused(probe_repository: Path, tmp_path: Path) -> None:
    """A model that was copied into the wrong folder with its manifest is named."""
    _with_manifest(probe_repository, tmp_path / "repository", model="preprocess")
    with pytest.raises(RepositoryError, match=r"unet: .*is the manifest of model\.onnx of preprocess"):
        check_repository(tmp_path / "repository", "cpu")


def test_the_shipped_models_are_those_of_their_manifests() -> None:
    """What is committed can be served, and no manifest was forgotten."""
    check_repository(REPOSITORY, "cpu")
    for model in ("preprocess", "unet"):
        assert (REPOSITORY / model / "1" / "model.onnx.manifest.json").is_file()
