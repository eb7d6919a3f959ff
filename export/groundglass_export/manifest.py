"""The manifest beside a model file: where the file came from, what was decided in it, how it was checked.

It holds no date and no path, so that the same checkpoint gives the same manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from groundglass.contract import LUNG_WINDOW_CENTRE_HU, LUNG_WINDOW_WIDTH_HU, MANIFEST_FILE
from groundglass.errors import RepositoryError
from groundglass.publish import published

FORMAT = 1
MODEL_FILE = "model.onnx"
PACKAGES = ("groundglass", "torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything known of one model file. Digests are SHA-256 in hexadecimal.

    ``calibration`` is empty for a model that decides nothing (preprocess); ``parity`` holds the figures of the check
    against torch; ``training`` is the checkpoint's own summary.
    """

    model: str
    file: str
    model_sha256: str
    checkpoint_file: str
    checkpoint_sha256: str
    precision: str
    opset: int
    window_hu: Mapping[str, float]
    calibration: Mapping[str, float]
    parity: Mapping[str, Any]
    training: Mapping[str, Any]
    versions: Mapping[str, str]
    format: int = FORMAT

    def with_digest(self, model_sha256: str) -> Manifest:
        """The manifest of a file that is now written."""
        return replace(self, model_sha256=model_sha256)


def current_versions() -> dict[str, str]:
    """Versions of the packages that an export depends on."""
    return {package: version(package) for package in PACKAGES}


def lung_window() -> dict[str, float]:
    """The window that the preprocess graph applies, in Hounsfield units."""
    return {"centre": LUNG_WINDOW_CENTRE_HU, "width": LUNG_WINDOW_WIDTH_HU}


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write ``folder/manifest.json``; the old one is replaced only once the new one is whole."""
    path = folder / MANIFEST_FILE
    with published(path) as beside:
        beside.write_text(json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def read_manifest(folder: Path) -> Manifest:
    """Raises RepositoryError when the manifest is missing, is no JSON, or is of another format."""
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**content)
    except (OSError, ValueError, TypeError) as error:
        raise RepositoryError(f"{path} is no manifest: {error}; export the model again") from error
    if manifest.format != FORMAT:
        raise RepositoryError(f"{path} is of format {manifest.format}; this version reads {FORMAT}")
    return manifest
