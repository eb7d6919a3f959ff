"""8-bit PNG and JPEG slices: pictures of a lung window, without geometry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groundglass.errors import UnreadableFile
from groundglass_client.intake.quiet import quiet
from groundglass_client.intake.slices import MAX_PIXELS_PER_SLICE, FoundFile, Frame

SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg"})
_FORMATS: Final = ("PNG", "JPEG")
_DEEP_MODES: Final = ("I", "F")  # Pillow's integer and floating point modes: more than 8 bits


def is_picture(path: Path) -> bool:
    """Whether the file name says PNG or JPEG."""
    return path.suffix.lower() in SUFFIXES


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts names as people do: slice2 before slice10. Equal for names that differ in leading zeros or case alone."""
    parts = re.split(r"(\d+)", name.lower())
    return tuple((1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts)


def read_picture(file: FoundFile) -> Frame:
    """A picture as a frame of the series that its folder makes. Raises UnreadableFile."""
    with _opened(file.path, file.name) as picture:
        columns, rows = picture.size
    return Frame(
        file=file,
        frame=0,
        modality="picture",
        series_uid=str(Path(file.name).parent),
        series_number=None,
        instance_number=None,
        instance_uid="",
        transfer_syntax=None,
        rows=rows,
        columns=columns,
        pixel_spacing_mm=None,
        orientation=None,
        position_mm=None,
        table_position_mm=None,
        localizer=False,
        pixels=None,
    )


def read_grey(path: Path, name: str) -> NDArray[np.uint8]:
    """The greys of a picture, uint8 (rows, columns); colours become their luminance. Raises UnreadableFile."""
    with _opened(path, name) as picture:
        return np.asarray(picture.convert("L"))


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Image.Image]:
    """An 8-bit picture of a believable size. What Pillow raises, here or in the body, becomes UnreadableFile."""
    try:
        with quiet(), Image.open(path, formats=_FORMATS) as picture:
            columns, rows = picture.size
            if not 0 < rows * columns <= MAX_PIXELS_PER_SLICE:
                raise UnreadableFile(f"{name}: claims {rows} rows and {columns} columns; up to 4096 x 4096 are read")
            if picture.mode.startswith(_DEEP_MODES):
                raise UnreadableFile(f"{name}: has more than 8 bits a pixel; a picture of a lung window has 8")
            yield picture
    except UnreadableFile:
        raise
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more on damaged files.
    except Exception as error:
        raise UnreadableFile(f"{name}: is no readable PNG or JPEG ({type(error).__name__})") from error
