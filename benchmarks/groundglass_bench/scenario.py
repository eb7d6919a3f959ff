"""A scenario: what is measured, under which load, and what counts as good; read from a TOML file.

::

    kind = "ceiling"                     # one of groundglass_bench.kinds.KINDS
    summary = "one sentence for the report"
    [load]                               # the kind's settings: load, warm-up, repetitions or durations
    slices = 1600
    [thresholds]                         # by the name of a figure; at_least or at_most
    grpc = { at_least = 600 }
    [quick]                              # what --quick puts in place of [load]'s values
    slices = 64
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Final

from groundglass.errors import MissingExtra, SettingError
from groundglass_bench.settings import SETTINGS, LoadSettings

DIRECTIONS: Final = {"at_least": "≥", "at_most": "≤"}
_KEYS: Final = {"kind", "summary", "load", "thresholds", "quick"}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_RESERVED: Final = "report"


@dataclass(frozen=True, slots=True)
class Threshold:
    """A bound on a figure's median. ``direction`` is ``at_least`` or ``at_most``."""

    figure: str
    direction: str
    bound: float

    def keeps(self, value: float) -> bool:
        """Whether ``value`` is on the right side."""
        return value >= self.bound if self.direction == "at_least" else value <= self.bound

    def __str__(self) -> str:
        return f"{DIRECTIONS[self.direction]} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario as it will run; ``quick`` says that its load is the small one."""

    name: str
    kind: str
    summary: str
    load: LoadSettings
    thresholds: tuple[Threshold, ...]
    quick: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The load as plain values."""
        return asdict(self.load)


def built_in() -> dict[str, Path]:
    """The scenarios of the package, by name."""
    folder = Path(str(resources.files("groundglass_bench") / "scenarios"))
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def choose_scenarios(asked: Iterable[str], *, quick: bool) -> list[Scenario]:
    """The scenarios named, or read from the files named; all of the package when none is.

    Raises SettingError for a name that is unknown or comes twice, and for a file that makes no scenario.
    """
    known = built_in()
    files = [_file(name, known) for name in asked] or list(known.values())
    scenarios = [read_scenario(file, quick=quick) for file in files]
    names = [scenario.name for scenario in scenarios]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingError(f"--scenario {twice[0]} was given twice: each writes its result under its name")
    return scenarios


def read_scenario(file: Path, *, quick: bool = False) -> Scenario:
    """The scenario in a TOML file, its load shrunk when ``quick``. Raises SettingError, naming file and key."""
    content = _toml(file)
    where = f"scenario {file}"
    if not _NAME.fullmatch(file.stem) or file.stem == _RESERVED:
        raise SettingError(f"{where}: its result is named after it; expected letters, digits, - and _, not {_RESERVED}")
    if unknown := sorted(content.keys() - _KEYS):
        raise SettingError(f"{where}: unknown key {unknown[0]}; known are {', '.join(sorted(_KEYS))}")
    kind = str(content.get("kind"))
    if kind not in SETTINGS:
        raise SettingError(f"{where}: kind {kind!r}; known are {', '.join(SETTINGS)}")
    tables = {key: content.get(key, {}) for key in ("load", "thresholds", "quick")}
    if wrong := [key for key, table in tables.items() if not isinstance(table, dict)]:
        raise SettingError(f"{where}: {wrong[0]} must be a table")
    full = _load(SETTINGS[kind], tables["load"], f"{where}, [load]")
    small = _load(SETTINGS[kind], {**tables["load"], **tables["quick"]}, f"{where}, [quick]")
    return Scenario(
        name=file.stem,
        kind=kind,
        summary=str(content.get("summary", "")),
        load=small if quick else full,
        thresholds=tuple(_threshold(name, entry, where) for name, entry in tables["thresholds"].items()),
        quick=quick,
    )


def _file(name: str, known: Mapping[str, Path]) -> Path:
    if name in known:
        return known[name]
    file = Path(name)
    if file.suffix != ".toml" and not file.is_file():
        raise SettingError(f"--scenario {name}: unknown; known are {', '.join(known)}, or give a .toml file")
    return file


def _toml(file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ModuleNotFoundError as error:
            raise MissingExtra("tomli", "bench") from error
    try:
        content: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"scenario {file}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"scenario {file} is no TOML: {error}") from error
    return content


def _load(kind: type[LoadSettings], table: Mapping[str, Any], where: str) -> LoadSettings:
    known = {field.name for field in fields(kind)}
    if unknown := sorted(table.keys() - known):
        raise SettingError(f"{where}: unknown key {unknown[0]}; known are {', '.join(sorted(known))}")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from error
    except TypeError as error:  # a key that has no default is missing
        raise SettingError(f"{where}: {str(error).partition(' ')[2]}") from error


def _threshold(figure: str, entry: Any, where: str) -> Threshold:
    bounds = entry if isinstance(entry, dict) else {}
    if len(bounds) != 1 or not bounds.keys() <= DIRECTIONS.keys():
        raise SettingError(
            f"{where}: threshold {figure} is {entry!r}; expected {{ at_least = N }} or {{ at_most = N }}"
        )
    ((direction, bound),) = bounds.items()
    if isinstance(bound, bool) or not isinstance(bound, int | float):
        raise SettingError(f"{where}: threshold {figure} has the bound {bound!r}; expected a number")
    return Threshold(figure, direction, float(bound))
