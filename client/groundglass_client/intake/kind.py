"""What a file is, from its first bytes and its name: DICOM, a picture, something else."""

from __future__ import annotations

from enum import Enum
from typing import Final

from groundglass.errors import NotACtSlice, UnreadableFile
from groundglass_client.intake.attributes import HEAD_BYTES, looks_like_dicom
from groundglass_client.intake.pictures import is_picture
from groundglass_client.intake.slices import FoundFile

_DICOM_SUFFIXES: Final = frozenset({".dcm", ".dicom", ".ima"})
_APPLE_DOUBLE: Final = b"\x00\x05\x16\x07"


class Kind(Enum):
    """The readers that a file can go to."""

    DICOM = "dicom"
    PICTURE = "picture"


def kind_of(file: FoundFile) -> Kind:
    """Which reader a file belongs to.

    Raises NotACtSlice for a file that has nothing to do with images, UnreadableFile for one that should be DICOM by its
    name and is not, or that can't be read.
    """
    head = _head(file)
    if head.startswith(_APPLE_DOUBLE):
        raise NotACtSlice(f"{file.name}: is a macOS resource fork, which copies leave beside the real file")
    if looks_like_dicom(head):
        return Kind.DICOM
    if is_picture(file.path):
        return Kind.PICTURE
    if file.path.suffix.lower() in _DICOM_SUFFIXES:
        raise UnreadableFile(f"{file.name}: is {'no DICOM file, whatever its name says' if head else 'empty'}")
    raise NotACtSlice(f"{file.name}: is neither DICOM nor a picture")


def _head(file: FoundFile) -> bytes:
    if file.path.exists() and not file.path.is_file():  # opening a pipe would wait for its writer for ever
        raise NotACtSlice(f"{file.name}: is no regular file")
    try:
        with file.path.open("rb") as stream:
            return stream.read(HEAD_BYTES)
    except OSError as error:
        raise UnreadableFile(f"{file.name}: can't be read from disk ({error.strerror})") from error
