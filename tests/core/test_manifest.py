"""The manifest as a file: what is written is read, and what can't be trusted is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from groundglass.errors import RepositoryError
from groundglass.manifest import (
    Manifest,
    Source,
    check_digest,
    file_digest,
    manifest_path,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A model file with its manifest."""
    path = tmp_path / "model.plan"
    path.write_bytes(b"a plan")
    manifest = Manifest(
        model="unet",
        file=path.name,
        model_sha256=file_digest(path),
        sources=(Source("checkpoint", "unet.safetensors", "ab" * 32), Source("fp16", "model.onnx", "cd" * 32)),
        precision="fp16",
        opset=20,
        window_hu={"centre": -600.0, "width": 1500.0},
        calibration={"probability_threshold": 0.6, "min_lesion_pixels": 240},
        parity={"slices": 4},
        training={},
        versions={"tensorrt": "10.12"},
        profile={"min": 1, "opt": 16, "max": 64},
        target={"runtime": "tensorrt", "compute_capabilities": ["9.0"]},
        reproducible="no: tactics are timed",
    )
    write_manifest(path, manifest)
    return path


def test_what_is_written_is_read(model_file: Path) -> None:
    """Every field comes back, and the file of the manifest passes its own check."""
    manifest = read_manifest(model_file)
    assert manifest.sources[1] == Source("fp16", "model.onnx", "cd" * 32)
    assert manifest.profile == {"min": 1, "opt": 16, "max": 64}
    assert manifest.target["compute_capabilities"] == ["9.0"]
    check_digest(model_file, manifest)
    assert (
        manifest_path(write_manifest(model_file, manifest).with_name("model.plan")).name == "model.plan.manifest.json"
    )


def test_a_changed_model_is_refused_by_name(model_file: Path) -> None:
    """One more byte in the model file, and the refusal names the file and both digests."""
    manifest = read_manifest(model_file)
    model_file.write_bytes(b"a plan.")
    with pytest.raises(RepositoryError, match=rf"model\.plan .* SHA-256 {file_digest(model_file)[:12]}.*expected "):
        check_digest(model_file, manifest)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("", "is no manifest"),
        ("[1]", "is of format None"),
        ('{"format": 1}', "is of format 1; this version reads 2"),
        ('{"format": 2}', "'sources'"),
        ('{"format": 2, "sources": [{"role": "fp32"}]}', "missing"),
        ('{"format": 2, "sources": [], "colour": "red"}', "colour"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(damage: str, complaint: str, model_file: Path) -> None:
    """No JSON, another format, fields that are missing or unknown."""
    manifest_path(model_file).write_text(damage, encoding="utf-8")
    with pytest.raises(RepositoryError, match=r"model\.plan\.manifest\.json") as refusal:
        read_manifest(model_file)
    assert complaint in str(refusal.value)


def test_a_missing_manifest_is_named(model_file: Path) -> None:
    """The message says which file is missing."""
    manifest_path(model_file).unlink()
    with pytest.raises(RepositoryError, match=r"has no manifest: .*model\.plan\.manifest\.json"):
        read_manifest(model_file)


def test_the_text_is_sorted(model_file: Path) -> None:
    """Two manifests can be compared line by line."""
    text = manifest_path(model_file).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
