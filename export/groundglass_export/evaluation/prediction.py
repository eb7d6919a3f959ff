"""Who answers: one face for a checkpoint, an exported graph and a live server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from groundglass.study import SliceSource, Study

DecodeHu = Callable[[SliceSource], NDArray[np.int16]]


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What a model says of the n slices of a study, in their order.

    masks: uint8 (n, 512, 64), 1 bit a pixel, big-endian bits; pixels: int32 (n,), the model's own count; positive: bool
    (n,).
    """

    masks: NDArray[np.uint8]
    pixels: NDArray[np.int32]
    positive: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model answered. ``way`` is ``checkpoint``, ``model`` or ``server``; digests are SHA-256 in hexadecimal.

    A live server does not tell digests: there they are None, and ``version`` is what it serves. ``checkpoint_sha256``
    is the checkpoint that a graph was exported from, where its manifest says. ``positive_run`` is a server's own rule
    for a scan. ``versions`` are those of the packages that computed here.
    """

    way: str
    name: str
    sha256: str | None = None
    preprocess_sha256: str | None = None
    checkpoint_sha256: str | None = None
    precision: str | None = None
    version: str | None = None
    positive_run: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


class Predictor(Protocol):
    """A model that answers for whole studies."""

    def predict(self, study: Study, decode_hu: DecodeHu, on_slices: Callable[[int], None]) -> Predictions:
        """Answers to every slice of ``study``. ``on_slices`` is called with the number of slices newly answered.

        Raises what ``decode_hu`` raises, ModelError, and ServerError.
        """

    def identity(self) -> ModelIdentity:
        """Which model it is; asked after the last answer, since a server may change its mind."""
