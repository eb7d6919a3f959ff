"""The manifest beside a model file: where the file came from, what was decided in it, how it was checked.

It holds no date and no path, so that the same sources give the same manifest. A file whose digest is not the manifest's
is refused: by ``groundglass`` before a server starts, and by the stand-in backends when they load it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from groundglass.errors import RepositoryError
from groundglass.publish import published

FORMAT: Final = 2
SUFFIX: Final = ".manifest.json"
_DIGITS_SHOWN: Final = 12


@dataclass(frozen=True, slots=True)
class Source:
    """A file that a model was made from: its role (``checkpoint``, ``fp32``, ``fp16``), name and SHA-256."""

    role: str
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything known of one model file. Digests are SHA-256 in hexadecimal.

    ``sources`` begins with the checkpoint and names every file on the way. ``precision`` is ``fp32``, ``fp16`` or
    ``int8``; ``precision_detail`` says what was kept in another one. ``calibration`` holds the thresholds of mask and
    verdict and is empty for a model that decides nothing (preprocess). ``quantization`` describes the slices that set
    INT8 ranges; ``profile`` (batch sizes) and ``target`` (runtime, version, GPU) a TensorRT plan. ``parity`` holds the
    figures of the check that the file passed. ``reproducible`` is ``yes`` when the same sources and versions give the
    same bytes, or else the reason why not.
    """

    model: str
    file: str
    model_sha256: str
    sources: tuple[Source, ...]
    precision: str
    opset: int
    window_hu: Mapping[str, float]
    calibration: Mapping[str, float]
    parity: Mapping[str, Any]
    training: Mapping[str, Any]
    versions: Mapping[str, str]
    precision_detail: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, int] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    reproducible: str = "yes"
    format: int = FORMAT

    def with_digest(self, model_sha256: str) -> Manifest:
        """The manifest of a file that is now written."""
        return replace(self, model_sha256=model_sha256)

    def as_source(self) -> Source:
        """How the manifest of a file made from this one names it."""
        return Source(self.precision, self.file, self.model_sha256)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def manifest_path(model_file: Path) -> Path:
    """``model.onnx`` has ``model.onnx.manifest.json``, so that a plan and a graph can share a version folder."""
    return model_file.with_name(model_file.name + SUFFIX)


def write_manifest(model_file: Path, manifest: Manifest) -> Path:
    """Write the manifest beside ``model_file``; the old one is replaced only once the new one is whole."""
    path = manifest_path(model_file)
    with published(path) as beside:
        beside.write_text(json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def read_manifest(model_file: Path) -> Manifest:
    """The manifest of ``model_file``, whose digest is not compared: that is :func:`check_digest`.

    Raises RepositoryError when it is missing, is no JSON, or is of another format.
    """
    path = manifest_path(model_file)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RepositoryError(f"{model_file} has no manifest: {path} is missing; export the model again") from None
    except (OSError, ValueError) as error:
        raise RepositoryError(f"{path} is no manifest: {error}; export the model again") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise RepositoryError(f"{path} is of format {found}; this version reads {FORMAT}: export the model again")
    try:
        sources = tuple(Source(**source) for source in content.pop("sources"))
        return Manifest(sources=sources, **content)
    except (KeyError, TypeError) as error:
        raise RepositoryError(f"{path} is no manifest: {error}; export the model again") from error


def check_digest(model_file: Path, manifest: Manifest) -> None:
    """Raise RepositoryError when ``model_file`` is not the file that the manifest describes."""
    found = file_digest(model_file)
    if found != manifest.model_sha256:
        raise RepositoryError(
            f"{model_file} is not the file of its manifest: SHA-256 {found[:_DIGITS_SHOWN]}..., expected "
            f"{manifest.model_sha256[:_DIGITS_SHOWN]}...; export or copy model and manifest again"
        )
