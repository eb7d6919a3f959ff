"""A recipe: which data, which stages, which rates. Values read from a TOML file; see ``export/recipes``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from groundglass.errors import SettingError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

KINDS = ("masked_images", "healthy_series", "labelled_series")


@dataclass(frozen=True, slots=True)
class Source:
    """One data set. Folders are relative to the data root.

    - ``masked_images``: 8-bit images in ``folder``, masks of the same names in ``masks``. A running number in the file
      name orders them; ``scan_starts`` are the numbers at which a new scan begins.
    - ``healthy_series``: one DICOM series without any lesion: every mask is empty.
    - ``labelled_series``: one DICOM series and a JSON list of ``{file, infected}`` in ``labels``. Only slices labelled
      0 are used, as empty masks: a label does not say where a lesion is.

    ``weight`` is the source's share of the draws, relative to the other sources'. ``validation_scans`` (positions in
    ``scan_starts``, or [0] for a series) are held out: a scan is never split.
    """

    kind: str
    folder: str
    masks: str = ""
    labels: str = ""
    scan_starts: tuple[int, ...] = (0,)
    validation_scans: tuple[int, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"source {self.folder}: kind {self.kind!r}, expected one of {', '.join(KINDS)}")


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of the training at one image size.

    ``until`` is the share of the whole training at which it ends. ``zoom`` bounds the scale augmentation: at 1.0 the
    slice fills the image. ``freeze_batch_norm`` keeps the running statistics, which small batches would spoil.
    """

    until: float
    side: int
    batch: int
    zoom: tuple[float, float]
    freeze_batch_norm: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the outcome of a training, but for the wall clock."""

    sources: tuple[Source, ...]
    stages: tuple[Stage, ...]
    seed: int = 17
    encoder_rate: float = 2e-4
    decoder_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup_share: float = 0.03
    ema_decay: float = 0.99
    opacity_probability: float = 0.35
    validation_stride: int = 4
    """``opacity_probability``: how often a healthy DICOM slice gets a synthetic opacity; ``validation_stride``: every
    n-th held-out slice is looked at while training."""


def read_recipe(path: Path) -> Recipe:
    """Raises SettingError for an unreadable file, an unknown key, or a value that makes no recipe."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"recipe {path} is unreadable: {error}") from error
    sources = tuple(_build(Source, table, path) for table in content.pop("source", []))
    stages = tuple(_build(Stage, table, path) for table in content.pop("stage", []))
    if not sources or not stages:
        raise SettingError(f"recipe {path}: expected at least one [[source]] and one [[stage]]")
    return _build(Recipe, {**content, "sources": sources, "stages": stages}, path)


def _build(kind: type[T], table: Mapping[str, Any], path: Path) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(table.keys() - known):
        raise SettingError(
            f"recipe {path}: unknown key {', '.join(unknown)}; {kind.__name__} knows {', '.join(sorted(known))}"
        )
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
    except TypeError as error:
        raise SettingError(f"recipe {path}: {error}") from error
