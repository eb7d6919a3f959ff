"""Slices that a command compares or calibrates on: studies that the user names, or else a phantom."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from groundglass.study import Study
    from groundglass_export.gate import GateScan

PHANTOM_SLICES: Final = 24
PHANTOM_LESION: Final = (4, 20)
"""Sixteen slices with ground glass, so that the scan verdict of 15 in a row is put to the test too."""


@contextmanager
def opened_scans(studies: Sequence[Path]) -> Iterator[list[GateScan]]:
    """The slices of every study, decoded when they are asked for; of a phantom when ``studies`` is empty.

    Raises StudyError, naming the file, for a study that can't be read.
    """
    from groundglass_client.intake import open_study

    with ExitStack() as stack:
        if not studies:
            studies = [_phantom(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "phantom")]
        yield [_scan(path, stack.enter_context(open_study(path))) for path in studies]


def _scan(path: Path, study: Study) -> GateScan:
    from groundglass_client.intake import decode_hu
    from groundglass_export.gate import GateScan

    return GateScan(path.resolve().name, len(study.slices), lambda index: decode_hu(study.slices[index]))


def _phantom(folder: Path) -> Path:
    from groundglass_client.phantom import PhantomSettings, write_phantom

    write_phantom(PhantomSettings(slices=PHANTOM_SLICES, lesion=PHANTOM_LESION), folder)
    return folder
