"""What can be said against a version from its files alone, before a server sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from groundglass import contract
from groundglass.errors import RepositoryError, VersionRefused
from groundglass.manifest import Manifest, check_digest, read_manifest

THRESHOLDS: Final = frozenset({"probability_threshold", "min_lesion_pixels"})
"""What a version decides by; its graph holds them, its manifest states them."""

_WINDOW: Final = {"centre": contract.LUNG_WINDOW_CENTRE_HU, "width": contract.LUNG_WINDOW_WIDTH_HU}
_TARGET: Final = ("runtime", "version", "compute_capabilities")


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table that says go or no-go: what was looked at, what was found, what is allowed."""

    what: str
    found: str
    allowed: str
    passed: bool


def check_files(
    files: Sequence[Path], live: Mapping[str, Manifest], *, new_thresholds: bool = False
) -> Iterator[Check]:
    """Every check of a version's model files, against those of the ``live`` version by the same names.

    ``new_thresholds`` lets a version decide by other thresholds than the live one: the operator has said so.
    """
    for file in files:
        try:
            manifest = read_manifest(file)
            check_digest(file, manifest)
        except RepositoryError as error:
            yield Check(f"{file.name}: manifest", str(error), "the file's own", False)
            continue
        yield Check(f"{file.name}: manifest", f"SHA-256 {manifest.model_sha256[:12]}", "the file's own", True)
        yield from _check_manifest(file.name, manifest, live.get(file.name), new_thresholds=new_thresholds)


def require(version: int, checks: Sequence[Check], consequence: str) -> None:
    """Raise VersionRefused with everything that did not pass, in one line."""
    failed = [check for check in checks if not check.passed]
    if failed:
        reasons = "; ".join(f"{check.what}: {check.found}, allowed {check.allowed}" for check in failed)
        raise VersionRefused(f"version {version} is refused, {consequence}: {reasons}")


def _check_manifest(name: str, manifest: Manifest, live: Manifest | None, *, new_thresholds: bool) -> Iterator[Check]:
    described = f"{manifest.file} of {manifest.model}"
    expected = f"{name} of {contract.UNET.name}"
    yield Check(f"{name}: model", described, expected, described == expected)
    yield Check(f"{name}: window, HU", _words(manifest.window_hu), _words(_WINDOW), dict(manifest.window_hu) == _WINDOW)
    yield _check_thresholds(name, manifest, live, new_thresholds=new_thresholds)
    passed = manifest.parity.get("passed")
    said = {None: "not compared yet", True: "passed"}.get(passed, "failed")
    yield Check(f"{name}: parity gate of its export", said, "not failed", passed in (None, True))
    if live is not None and (manifest.target or live.target):
        found, wanted = _target(manifest), _target(live)
        yield Check(f"{name}: built for", _words(found), _words(wanted), _fits(manifest, live))


def _check_thresholds(name: str, manifest: Manifest, live: Manifest | None, *, new_thresholds: bool) -> Check:
    stated = dict(manifest.calibration)
    what = f"{name}: thresholds"
    if set(stated) != THRESHOLDS:
        return Check(what, _words(stated) or "missing", " and ".join(sorted(THRESHOLDS)), False)
    if live is None:
        return Check(what, _words(stated), "any: the live version states none", True)
    if new_thresholds:
        return Check(what, _words(stated), "any: new thresholds were asked for", True)
    wanted = dict(live.calibration)
    return Check(what, _words(stated), f"{_words(wanted)}, as the live version (or --new-thresholds)", stated == wanted)


def _target(manifest: Manifest) -> dict[str, Any]:
    return {key: manifest.target[key] for key in _TARGET if key in manifest.target}


def _fits(manifest: Manifest, live: Manifest) -> bool:
    """Whether a plan may run where the live version runs, as far as both say: the server has the last word."""
    found, wanted = manifest.target, live.target
    same = {key: found.get(key) == wanted.get(key) for key in _TARGET}
    return (
        same["runtime"]
        and (same["version"] or bool(found.get("version_compatible")))
        and (same["compute_capabilities"] or found.get("hardware_compatibility", "none") != "none")
    )


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))
