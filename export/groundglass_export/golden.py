"""Golden answers: what the FP32 reference said of given scans, kept in a file, so that a version can be held to it
where the reference can't run.

The file holds no Hounsfield units, only their digests. A phantom is made again from its settings, so golden answers of
one can be shipped; a study must be given again, slice for slice.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import MASK
from groundglass.errors import RepositoryError
from groundglass.manifest import Source
from groundglass.publish import published
from groundglass_export.answers import Answers

FORMAT: Final = 1
_DIGEST_BYTES: Final = 32  # SHA-256
_ABOUT: Final = "about"
_ROWS: Final = ("slices_sha256", "masks", "pixels", "positive")
"""What the file holds of every slice, all scans in a row; ``about`` is JSON and says the rest."""

_DAMAGED: Final = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, slots=True, eq=False)
class GoldenScan:
    """What the reference says of the n slices of one scan, head to feet.

    slices_sha256: :func:`slice_digest` of each. masks: uint8 (n, 512, 64), bit-packed as ``MASK`` is; pixels: int32
    (n,); positive: bool (n,). phantom: the settings that make the scan again; None for a study.
    """

    name: str
    slices_sha256: tuple[str, ...]
    masks: NDArray[np.uint8]
    pixels: NDArray[np.int32]
    positive: NDArray[np.bool_]
    phantom: Mapping[str, Any] | None = None

    @property
    def count(self) -> int:
        """Slices."""
        return len(self.slices_sha256)

    def answer(self, index: int) -> Answers:
        """Of slice ``index``, as n = 1; its probabilities were not kept."""
        one = slice(index, index + 1)
        mask = np.unpackbits(self.masks[one], axis=2).view(np.bool_)
        return Answers(mask, self.pixels[one], self.positive[one], None)


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """The answers of one reference, which ``reference`` names as manifests do: role ``fp32``, file, SHA-256.

    preprocess_sha256: of the graph that made its images. calibration and window_hu: what it decides by. versions: of
    the packages that computed it.
    """

    reference: Source
    preprocess_sha256: str
    calibration: Mapping[str, float]
    window_hu: Mapping[str, float]
    versions: Mapping[str, str]
    scans: tuple[GoldenScan, ...]

    @property
    def file(self) -> str:
        """Name of the reference's file."""
        return self.reference.file


def write_golden(golden: Golden, out: Path) -> Path:
    """Write the answers; an old file is replaced only once the new one is whole. The same answers, the same bytes.

    Raises RepositoryError when it can't be written.
    """
    digests = "".join(digest for scan in golden.scans for digest in scan.slices_sha256)
    rows = {
        "slices_sha256": np.frombuffer(bytes.fromhex(digests), np.uint8).reshape(-1, _DIGEST_BYTES),
        **{name: np.concatenate([getattr(scan, name) for scan in golden.scans]) for name in _ROWS[1:]},
    }
    try:
        with published(out) as beside, beside.open("wb") as stream:
            np.savez_compressed(stream, **{_ABOUT: np.frombuffer(_about(golden), np.uint8)}, **rows)
    except OSError as error:
        raise RepositoryError(f"{out} was not written: {error}") from error
    return out


def read_golden(path: Path) -> Golden:
    """Golden answers from their file. Raises RepositoryError when it is missing, damaged or of another format."""
    try:
        whole = path.read_bytes()
    except OSError as error:
        raise RepositoryError(f"{path}: no golden answers there ({error.strerror}); record some first") from error
    try:
        with zipfile.ZipFile(io.BytesIO(whole)) as members:
            if broken := members.testzip():
                raise ValueError(f"{broken} has another checksum than when it was written")
        with np.load(io.BytesIO(whole), allow_pickle=False) as arrays:
            return _golden(json.loads(arrays[_ABOUT].tobytes()), {name: arrays[name] for name in _ROWS})
    except _DAMAGED as error:
        raise RepositoryError(f"{path} holds no golden answers that can be read: {error}; record them again") from error


def _about(golden: Golden) -> bytes:
    content = {
        "format": FORMAT,
        "reference": {
            "role": golden.reference.role,
            "file": golden.reference.file,
            "sha256": golden.reference.sha256,
        },
        "preprocess_sha256": golden.preprocess_sha256,
        "calibration": dict(golden.calibration),
        "window_hu": dict(golden.window_hu),
        "versions": dict(golden.versions),
        "scans": [{"name": scan.name, "slices": scan.count, "phantom": scan.phantom} for scan in golden.scans],
    }
    return json.dumps(content, sort_keys=True).encode()


def _golden(about: dict[str, Any], rows: Mapping[str, NDArray[Any]]) -> Golden:
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']}; this version reads {FORMAT}")
    counts = [scan["slices"] for scan in about["scans"]]
    _check_rows(rows, sum(counts))
    return Golden(
        reference=Source(**about["reference"]),
        preprocess_sha256=about["preprocess_sha256"],
        calibration=about["calibration"],
        window_hu=about["window_hu"],
        versions=about["versions"],
        scans=tuple(
            _scan(scan, {name: array[start:end] for name, array in rows.items()})
            for scan, (start, end) in zip(about["scans"], pairwise(accumulate(counts, initial=0)), strict=True)
        ),
    )


def _check_rows(rows: Mapping[str, NDArray[Any]], count: int) -> None:
    for name, dtype, dims in (
        ("slices_sha256", np.uint8, (_DIGEST_BYTES,)),
        ("masks", np.uint8, MASK.dims),
        ("pixels", np.int32, ()),
        ("positive", np.bool_, ()),
    ):
        if rows[name].dtype != dtype or rows[name].shape != (count, *dims):
            raise ValueError(
                f"{name} is {rows[name].dtype} {rows[name].shape}, expected {dtype.__name__}, {count} rows"
            )


def _scan(about: Mapping[str, Any], rows: Mapping[str, NDArray[Any]]) -> GoldenScan:
    return GoldenScan(
        name=about["name"],
        slices_sha256=tuple(digest.tobytes().hex() for digest in rows["slices_sha256"]),
        masks=rows["masks"],
        pixels=rows["pixels"],
        positive=rows["positive"],
        phantom=about["phantom"],
    )
