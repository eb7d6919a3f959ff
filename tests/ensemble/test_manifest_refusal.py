"""A stand-in refuses a model file that is not the one of its manifest, and serves a file without one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from groundglass.errors import RepositoryError, ServeFailed
from groundglass.manifest import manifest_path, read_manifest
from groundglass_ensemble.backends.shared.stand_in_manifest import check_file
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings

Write = Callable[[Path], object]


def described(model: Path) -> Path:
    """A manifest that fits the file. Returns its path."""
    path = model.with_name(f"{model.name}.manifest.json")
    path.write_text(json.dumps({"model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(), "precision": "fp16"}))
    return path


def test_the_manifest_lies_where_the_library_writes_it(tmp_path: Path) -> None:
    """Library and stand-in, which share no code, look for the manifest in the same place."""
    assert manifest_path(tmp_path / "model.plan") == described_path(tmp_path / "model.plan")


def described_path(model: Path) -> Path:
    """Where a stand-in finds the manifest."""
    model.write_bytes(b"plan")
    path = described(model)
    assert check_file(model)["precision"] == "fp16"
    return path


def test_a_file_without_a_manifest_is_served(tmp_path: Path) -> None:
    """Any repository must work: no manifest, nothing to hold the file against."""
    model = tmp_path / "model.onnx"
    model.write_bytes(b"graph")
    assert check_file(model) == {}


def test_another_file_than_the_manifests_is_refused(tmp_path: Path) -> None:
    """One flipped bit is told with the file and the first twelve digits of both digests."""
    model = tmp_path / "model.onnx"
    model.write_bytes(b"graph")
    described(model)
    expected = hashlib.sha256(b"graph").hexdigest()[:12]
    model.write_bytes(b"grapi")
    found = hashlib.sha256(b"grapi").hexdigest()[:12]
    with pytest.raises(RuntimeError, match=rf"model\.onnx is not .*SHA-256 {found}\.\.\., expected {expected}\.\.\.:"):
        check_file(model)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_text('{"model_sha256": "12'), "Unterminated string"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "codec can't decode"),
        (lambda path: path.write_text("[]"), "no model_sha256"),
        (lambda path: path.write_text('{"model_sha256": 12}'), "no model_sha256"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
    ids=["cut off", "bytes", "list", "number", "folder"],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, write: Write, words: str) -> None:
    """A manifest that can't be read is named, by the stand-in as by the library."""
    model = tmp_path / "model.onnx"
    model.write_bytes(b"graph")
    write(tmp_path / "model.onnx.manifest.json")
    with pytest.raises(RuntimeError, match=rf"model\.onnx\.manifest\.json is damaged \(.*{words}"):
        check_file(model)
    with pytest.raises(RepositoryError, match=r"model\.onnx\.manifest\.json"):
        read_manifest(model)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_text('{"model_sha256": "%s"}' % ("0" * 64)), "expected 000000000000"),
        (lambda path: path.write_text("no manifest"), "model.onnx.manifest.json is damaged"),
    ],
    ids=["digest", "damaged"],
)
def test_a_real_server_refuses_by_name(probe_repository: Path, tmp_path: Path, write: Write, words: str) -> None:
    """Triton does not become ready, and repeats the stand-in's reason in one line."""
    root = Path(shutil.copytree(probe_repository, tmp_path / "repository"))
    write(root / "unet/1/model.onnx.manifest.json")
    with pytest.raises(ServeFailed, match=rf"unet.*{words}") as failure:
        EmbeddedTriton(ServeSettings(root)).start()
    assert "\n" not in str(failure.value)


@pytest.mark.triton
def test_a_real_server_serves_a_file_that_is_its_manifests(probe_repository: Path, tmp_path: Path) -> None:
    """With manifests that fit, the server becomes ready."""
    root = Path(shutil.copytree(probe_repository, tmp_path / "repository"))
    for name in ("preprocess", "unet"):
        described(root / name / "1" / "model.onnx")
    with EmbeddedTriton(ServeSettings(root)) as server:
        assert server.running
