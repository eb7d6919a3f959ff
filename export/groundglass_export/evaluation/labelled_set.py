"""A labelled set: which slices, which truth, and what the model has seen of them. Read from a TOML file.

::

    checkpoint_sha256 = "..."           # optional: the checkpoint that every `seen` below speaks of

    [[source]]
    name = "P001"                       # how the tables call it
    kind = "labelled_series"            # see KINDS
    seen = "never"                      # or "trained on", "chosen on": checkpoint or thresholds were chosen on it
    folder = "covid_ct_md/P001"         # paths start from the data folder
    labels = "covid_ct_md/P001_slice_labels.json"
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from groundglass.errors import SettingError
from groundglass.manifest import file_digest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NEVER: Final = "never"
SEEN: Final = ("trained on", "chosen on", NEVER)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSource:
    """What every source has. ``seen`` is one of :data:`SEEN`; it has no default, since a wrong one flatters."""

    name: str
    seen: str

    def __post_init__(self) -> None:
        if self.seen not in SEEN:
            raise SettingError(f"source {self.name}: seen = {self.seen!r}, expected one of {', '.join(SEEN)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedImages(SetSource):
    """8-bit images of scans, with lesion masks of the same names and sizes.

    A slice is positive when its mask holds a lesion pixel. The number in a file name orders the slices, ``scan_starts``
    are the numbers at which a new scan begins, as in a recipe; ``scans`` are the ones to take, by position, all of them
    when empty. ``scan_positive`` is the truth of each scan; without it, it is the verdict's own rule over the labels.
    """

    folder: str
    masks: str
    scan_starts: tuple[int, ...] = (0,)
    scans: tuple[int, ...] = ()
    scan_positive: bool | None = None

    def __post_init__(self) -> None:
        SetSource.__post_init__(self)
        if list(self.scan_starts) != sorted(set(self.scan_starts)) or not self.scan_starts:
            raise SettingError(f"source {self.name}: scan_starts {list(self.scan_starts)}, expected rising numbers")
        if outside := [scan for scan in self.scans if not 0 <= scan < len(self.scan_starts)]:
            raise SettingError(
                f"source {self.name}: scan {outside[0]} asked for; scan_starts names {len(self.scan_starts)}, from 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSeries(SetSource):
    """One DICOM study, and a JSON list of ``{"file": ..., label_key: 0 or 1}`` with a label for every slice."""

    folder: str
    labels: str
    label_key: str = "infected"
    scan_positive: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthySeries(SetSource):
    """One DICOM study without any lesion: every slice is negative, and so is the scan."""

    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledImages(SetSource):
    """Single 8-bit images in two folders. They make no scan, so they have slice figures only.

    The part of a file name before ``-p<number>`` or ``%`` tells which publication an image is from. ``fold_numbers``
    are the parts to take, of ``folds`` parts that a recipe divides the publications into; all of them when empty.
    """

    positive: str
    negative: str
    folds: int = 1
    fold_numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        SetSource.__post_init__(self)
        if outside := [number for number in self.fold_numbers if not 0 <= number < self.folds]:
            raise SettingError(f"source {self.name}: fold {outside[0]} asked for; there are {self.folds}, from 0")


KINDS: Final[Mapping[str, type[SetSource]]] = MappingProxyType(
    {
        "masked_images": MaskedImages,
        "labelled_series": LabelledSeries,
        "healthy_series": HealthySeries,
        "labelled_images": LabelledImages,
    }
)
_KIND_OF: Final = MappingProxyType({kind: word for word, kind in KINDS.items()})


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """The sources in the order of the file, and the file's SHA-256.

    ``checkpoint_sha256`` is the checkpoint that ``seen`` speaks of, empty when the file does not say.
    """

    file: str
    sha256: str
    sources: tuple[SetSource, ...]
    checkpoint_sha256: str = ""


def kind_of(source: SetSource) -> str:
    """The word that the file uses for it."""
    return _KIND_OF[type(source)]


def read_labelled_set(path: Path) -> LabelledSet:
    """Raises SettingError for a file that is missing, no TOML, empty, or has an unknown kind, key or value."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"{path}: no such file; expected a TOML file that describes a labelled set") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"labelled set {path} is unreadable: {error}") from error
    tables, checkpoint = content.pop("source", []), content.pop("checkpoint_sha256", "")
    if content or not isinstance(tables, list) or not isinstance(checkpoint, str):
        word = ", ".join(sorted(content)) or "source or checkpoint_sha256 of another type"
        raise SettingError(f"labelled set {path}: found {word}; expected checkpoint_sha256 and [[source]] tables only")
    if not tables:
        raise SettingError(f"labelled set {path} is empty: expected at least one [[source]]")
    sources = tuple(_source(path, place, table) for place, table in enumerate(tables, 1))
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingError(f"labelled set {path}: two sources are called {twice[0]!r}; give each a name of its own")
    return LabelledSet(path.name, file_digest(path), sources, checkpoint)


def _source(path: Path, place: int, table: Mapping[str, Any]) -> SetSource:
    where = f"labelled set {path}, source {table.get('name', place)}"
    kind = KINDS.get(str(table.get("kind")))
    if kind is None:
        raise SettingError(f"{where}: kind {table.get('kind')!r}, expected one of {', '.join(KINDS)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key != "kind"}
    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(values.keys() - known.keys()):
        raise SettingError(f"{where}: unknown key {unknown[0]}; {table['kind']} knows {', '.join(known)}")
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in values]:
        raise SettingError(f"{where}: {missing[0]} is missing; {table['kind']} needs it")
    for name, value in values.items():
        _require_type(where, name, value, str(known[name].type))
    build: Callable[..., SetSource] = kind
    try:
        return build(**values)
    except SettingError as error:
        raise SettingError(f"labelled set {path}, {error}") from error


def _words(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _numbers(value: object) -> bool:
    return isinstance(value, tuple) and all(type(item) is int for item in value)


_ACCEPTED: Final[Mapping[str, tuple[str, Callable[[object], bool]]]] = MappingProxyType(
    {
        "str": ("text", _words),
        "int": ("a whole number of 1 or more", lambda value: type(value) is int and value >= 1),
        "tuple[int, ...]": ("a list of whole numbers", _numbers),
        "bool | None": ("true or false", lambda value: isinstance(value, bool)),
    }
)
"""By the annotation of a field: what a person calls its values, and which they are."""


def _require_type(where: str, name: str, value: object, annotation: str) -> None:
    expected, accepts = _ACCEPTED[annotation]
    if not accepts(value):
        raise SettingError(f"{where}: {name} = {value!r}, expected {expected}")
