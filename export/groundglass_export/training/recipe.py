"""A recipe: which data, which stages, which rates. Values read from a TOML file; see ``export/recipes``.

What a recipe leaves out is as Lokwani et al. (arXiv:2006.13212) trained: binary cross-entropy, Adam at 1e-4 decayed
when the validation stops improving for 4 epochs, batches of 4 at 512x512, at most 50 epochs, the best checkpoint kept.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

from groundglass.errors import SettingError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_NEEDED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "masked_images": ("folder", "masks"),
        "healthy_series": ("folder",),
        "labelled_series": ("folder", "labels"),
        "labelled_images": ("positive", "negative"),
    }
)
KINDS: Final = tuple(_NEEDED)
LOSSES: Final = ("bce", "bce_dice")
OPTIMIZERS: Final = ("adam", "adamw")
SCHEDULES: Final = ("plateau", "linear")


@dataclass(frozen=True, slots=True)
class Source:
    """One data set. Folders are relative to the data root.

    - ``masked_images``: 8-bit images in ``folder``, masks of the same names in ``masks``. A running number in the file
      name orders them; ``scan_starts`` are the numbers at which a new scan begins.
    - ``healthy_series``: one DICOM series without any lesion: every mask is empty.
    - ``labelled_series``: one DICOM series and a JSON list of ``{file, label_key}`` in ``labels``. Slices labelled 0
      have an empty mask; a label of 1 does not say where the lesion is, and teaches through the slice loss alone.
    - ``labelled_images``: single 8-bit images of any size in the folders ``positive`` and ``negative``, labelled so.
      Their publications are divided into ``folds`` parts, by name: see ``file_names``.

    ``weight`` is the source's share of the draws, relative to the other sources'. What is held out is never trained on,
    and a scan is never split: ``validation_scans`` (positions in ``scan_starts``, or [0] for a series) and
    ``validation_folds`` choose the checkpoint; ``test_scans`` and ``test_folds`` are not looked at at all.
    """

    kind: str
    folder: str = ""
    masks: str = ""
    labels: str = ""
    label_key: str = "infected"
    positive: str = ""
    negative: str = ""
    scan_starts: tuple[int, ...] = (0,)
    validation_scans: tuple[int, ...] = ()
    test_scans: tuple[int, ...] = ()
    folds: int = 1
    validation_folds: tuple[int, ...] = ()
    test_folds: tuple[int, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"source {self.name}: kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        if missing := [key for key in _NEEDED[self.kind] if not getattr(self, key)]:
            raise SettingError(f"source {self.name}: {missing[0]} is missing; {self.kind} needs it")
        if self.weight < 0:
            raise SettingError(f"source {self.name}: weight {self.weight:g}, expected 0 or more")
        parts = self.folds if self.kind == "labelled_images" else len(self.scan_starts)
        for key in ("validation_scans", "test_scans", "validation_folds", "test_folds"):
            if outside := [number for number in getattr(self, key) if not 0 <= number < parts]:
                raise SettingError(f"source {self.name}: {key} names {outside[0]}; there are {parts}, from 0")

    @property
    def name(self) -> str:
        """How messages call it: its folder."""
        return self.folder or self.positive or "without a folder"


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of the training at one image size.

    ``until`` is the share of the whole training at which it ends. ``zoom`` bounds the scale augmentation: at 1.0 the
    slice fills the image. ``freeze_batch_norm`` keeps the running statistics, which small batches would spoil.
    ``int8`` rounds weights and activations as an INT8 graph does; see ``rounding``.
    """

    until: float = 1.0
    side: int = 512
    batch: int = 4
    zoom: tuple[float, float] = (1.0, 1.0)
    freeze_batch_norm: bool = False
    int8: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the outcome of a training, but for the wall clock.

    - ``loss``: of pixels, ``bce`` or ``bce_dice``. ``slice_loss`` is the weight of the loss of slices without lesion
      and of slices whose label is all that is known; 0 leaves the latter out.
    - ``logit_bound``: logits beyond it, either way, cost what ``loss.logit_penalty`` says; 0 for no bound.
    - ``optimizer``: ``adam`` or ``adamw``, with a rate for the encoder and one for the rest.
    - ``schedule``: ``plateau`` validates after each epoch, and divides the rates by ten when the validation's dice has
      not improved for ``patience`` epochs; ``linear`` warms up for ``warmup_share`` of the training, then falls to 0.
    - ``epochs``: the training ends after so many, or when its minutes are over.
    - ``ema_decay``: of the running mean of the weights, which is what is validated and kept; 0 keeps the weights.
    - ``augment``: views varied as ``augment`` describes; without it, slices as they are served.
    - ``opacity_probability``: how often a healthy DICOM slice gets a synthetic opacity.
    - ``validation_stride``: every n-th held-out slice is looked at while training.
    """

    sources: tuple[Source, ...]
    stages: tuple[Stage, ...] = (Stage(),)
    seed: int = 17
    loss: str = "bce"
    slice_loss: float = 0.0
    logit_bound: float = 0.0
    optimizer: str = "adam"
    encoder_rate: float = 1e-4
    decoder_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: str = "plateau"
    patience: int = 4
    warmup_share: float = 0.0
    epochs: int = 50
    ema_decay: float = 0.0
    augment: bool = False
    opacity_probability: float = 0.0
    validation_stride: int = 1

    def __post_init__(self) -> None:
        for key, known in (("loss", LOSSES), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, key) not in known:
                raise SettingError(f"{key} = {getattr(self, key)!r}, expected one of {', '.join(known)}")
        if self.opacity_probability and not self.augment:
            raise SettingError("opacity_probability is set, but augment = false leaves slices as they are")
        for key in ("encoder_rate", "decoder_rate", "slice_loss", "logit_bound", "weight_decay"):
            if not getattr(self, key) >= 0.0:
                raise SettingError(f"{key} = {getattr(self, key):g}, expected 0 or more")
        for key in ("epochs", "patience", "validation_stride"):
            if getattr(self, key) < 1:
                raise SettingError(f"{key} = {getattr(self, key)}, expected at least 1")
        if not 0.0 <= self.ema_decay < 1.0:
            raise SettingError(f"ema_decay = {self.ema_decay:g}, expected 0 or more and less than 1")


def read_recipe(path: Path) -> Recipe:
    """Raises SettingError for an unreadable file, an unknown key, or a value that makes no recipe."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"{path}: no such file; expected a TOML file that describes a training") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"recipe {path} is unreadable: {error}") from error
    sources = tuple(_build(Source, table, path) for table in content.pop("source", []))
    if not sources:
        raise SettingError(f"recipe {path}: expected at least one [[source]]")
    if stages := tuple(_build(Stage, table, path) for table in content.pop("stage", [])):
        content["stages"] = stages
    return _build(Recipe, {**content, "sources": sources}, path)


def _build(kind: type[T], table: Mapping[str, Any], path: Path) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(table.keys() - known):
        raise SettingError(
            f"recipe {path}: unknown key {', '.join(unknown)}; {kind.__name__} knows {', '.join(sorted(known))}"
        )
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
    except (TypeError, SettingError) as error:
        raise SettingError(f"recipe {path}: {error}") from error
