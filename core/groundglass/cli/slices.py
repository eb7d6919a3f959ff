"""Slices that a command compares or calibrates on: studies that the user names, or else a phantom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from groundglass.errors import RepositoryError, SettingError

if TYPE_CHECKING:
    from groundglass.study import Study
    from groundglass_export.gate import GateScan
    from groundglass_export.golden import Golden

PHANTOM: Final[Mapping[str, Any]] = MappingProxyType({"slices": 24, "lesion": (4, 20)})
"""Sixteen slices with ground glass, so that the scan verdict of 15 in a row is put to the test too."""

PHANTOM_NAME: Final = "phantom"


@contextmanager
def opened_scans(studies: Sequence[Path]) -> Iterator[list[GateScan]]:
    """The slices of every study, decoded when they are asked for; of a phantom when ``studies`` is empty.

    Raises StudyError, naming the file, for a study that can't be read.
    """
    from groundglass_client.intake import open_study

    if not studies:
        yield [phantom_scan(PHANTOM_NAME, PHANTOM)]
        return
    with ExitStack() as stack:
        yield [_scan(path, stack.enter_context(open_study(path))) for path in studies]


@contextmanager
def golden_scans(golden: Golden, studies: Sequence[Path]) -> Iterator[list[GateScan]]:
    """The scans that golden answers are of: ``studies``, or phantoms made again when no study is named.

    Raises SettingError for golden answers of studies when none is named, RepositoryError for a phantom's settings that
    are none, and what :func:`opened_scans` raises.
    """
    if studies:
        with opened_scans(studies) as scans:
            yield scans
        return
    if missing := [scan.name for scan in golden.scans if scan.phantom is None]:
        raise SettingError(f"the golden answers are of the study {missing[0]}: name it with --study")
    yield [phantom_scan(scan.name, scan.phantom) for scan in golden.scans if scan.phantom is not None]


def recorded_phantoms(studies: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The settings to record with golden answers, in full, of the phantom that stands in when ``studies`` is empty."""
    from groundglass_client.phantom import PhantomSettings

    return {} if studies else {PHANTOM_NAME: asdict(PhantomSettings(**PHANTOM))}


def phantom_scan(name: str, settings: Mapping[str, Any]) -> GateScan:
    """A phantom, made slice by slice. Raises RepositoryError and SettingError for settings that no phantom has."""
    from groundglass_client.phantom import PhantomSettings
    from groundglass_client.phantom.chest import Chest
    from groundglass_export.gate import GateScan

    lesion = settings.get("lesion")
    try:
        phantom = PhantomSettings(**{**settings, "lesion": None if lesion is None else tuple(lesion)})
        chest = Chest(phantom)
    except TypeError as error:
        raise RepositoryError(f"no phantom has the settings {dict(settings)}: {error}") from error
    return GateScan(name, phantom.slices, chest.hu)


def _scan(path: Path, study: Study) -> GateScan:
    from groundglass_client.intake import decode_hu
    from groundglass_export.gate import GateScan

    return GateScan(path.resolve().name, len(study.slices), lambda index: decode_hu(study.slices[index]))
