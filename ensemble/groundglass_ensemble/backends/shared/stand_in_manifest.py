"""The manifest beside a model file, as every stand-in reads it: a file that is not the manifest's is refused.

A model without a manifest is served: any repository must work.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

_SUFFIX = ".manifest.json"
_BLOCK_BYTES = 1 << 20
_DIGITS_SHOWN = 12


def read_manifest(model_file: Path) -> dict[str, Any] | None:
    """The manifest beside ``model_file``, None where there is none; raises RuntimeError when it is damaged."""
    path = model_file.with_name(model_file.name + _SUFFIX)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RuntimeError(f"the manifest {path} is damaged ({error}): copy model and manifest again") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("model_sha256"), str):
        raise RuntimeError(f"the manifest {path} is damaged (no model_sha256): copy model and manifest again")
    return manifest


def check_file(model_file: Path) -> dict[str, Any]:
    """The manifest of ``model_file``, {} without one; raises RuntimeError when the file is not the one it describes."""
    manifest = read_manifest(model_file)
    if manifest is None:
        return {}
    found, expected = _digest(model_file), manifest["model_sha256"]
    if found != expected:
        raise RuntimeError(
            f"{model_file} is not the file of its manifest: SHA-256 {found[:_DIGITS_SHOWN]}..., expected "
            f"{expected[:_DIGITS_SHOWN]}...: copy model and manifest again"
        )
    return manifest


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(partial(stream.read, _BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()
