"""A DICOM file's header, read within bounds, and the lookup of an attribute over the functional groups of a frame."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from types import MappingProxyType
from typing import Any, BinaryIO, Final

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_partial
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

MAX_INFLATED_BYTES: Final = 1 << 31
"""Bytes that a deflated dataset may inflate to. Deflate reaches 1000:1: unbounded, a small file fills the memory."""

_MAGIC: Final = b"DICM"
_PREAMBLE_BYTES: Final = 128
_GROUP_LENGTH_BYTES: Final = 12
_FIRST_GROUPS: Final = frozenset({b"\x02\x00", b"\x08\x00"})
_PIXEL_DATA_TAGS: Final = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_META_SEARCH_BYTES: Final = 4096
_LONGEST_ELEMENT_HEADER_BYTES: Final = 12
_IN_MEMORY_BYTES: Final = 1 << 16
"""Most headers end before: they are parsed in memory, where a step of the parser makes no call to the system."""

_TEXTS: Final = frozenset({"CS", "DS", "IS", "LO", "SH", "UI"})
_SHORTS: Final = MappingProxyType({("US", True): "<H", ("US", False): ">H", ("SS", True): "<h", ("SS", False): ">h"})

HEAD_BYTES: Final = _PREAMBLE_BYTES + len(_MAGIC)
"""The bytes of a file that :func:`looks_like_dicom` asks for."""


@dataclass(frozen=True, slots=True)
class Header:
    """The parsed attributes of a file, and the stream to find its pixels in.

    ``stream`` stands at the pixel data's element, or at its own end if there is none. For a deflated file it is the
    inflated dataset. ``syntax`` is the transfer syntax, guessed from the encoding where the file does not name it.
    """

    dataset: Dataset
    stream: BinaryIO
    syntax: UID


def looks_like_dicom(head: bytes) -> bool:
    """Whether a file starts like DICOM: with preamble and magic or, in old files, with a first element."""
    magic = head[_PREAMBLE_BYTES : _PREAMBLE_BYTES + len(_MAGIC)]
    return magic == _MAGIC or (head[:2] in _FIRST_GROUPS and head[3:4] == b"\x00")


def read_header(stream: BinaryIO, tags: Sequence[int]) -> Header:
    """Parse the attributes of those ``tags``, and stop before the pixel data.

    Raises whatever pydicom raises on broken input, and ValueError for a deflated dataset that is too large.
    """
    head = stream.read(_IN_MEMORY_BYTES)
    if _is_deflated(head):
        stream = inflate(stream)
        dataset: Dataset = read_dataset(stream, False, True, stop_when=_at_pixel_data, specific_tags=[*tags])
        return Header(dataset, stream, DeflatedExplicitVRLittleEndian)
    dataset = _parse_head(head, stream, tags) or _parse(stream, tags)
    return Header(dataset, stream, UID(str(dataset.file_meta.get("TransferSyntaxUID") or _guessed_syntax(dataset))))


def _parse_head(head: bytes, stream: BinaryIO, tags: Sequence[int]) -> Dataset | None:
    """As :func:`_parse`, in memory; None if the pixel data begins later in the file than ``head`` ends."""
    memory = BytesIO(head)
    whole = len(head) < _IN_MEMORY_BYTES
    try:
        dataset = _parse(memory, tags)
    except Exception:  # pydicom raises nearly anything where its input is cut off
        if whole:
            raise
        return None
    if not whole and memory.tell() >= len(head) - _LONGEST_ELEMENT_HEADER_BYTES:
        return None
    stream.seek(memory.tell())
    return dataset


def _parse(stream: BinaryIO, tags: Sequence[int]) -> Dataset:
    stream.seek(0)
    return read_partial(stream, stop_when=_at_pixel_data, force=True, specific_tags=[*tags])


def inflate(stream: BinaryIO) -> BinaryIO:
    """The inflated dataset of a deflated DICOM file (PS3.5 A.5), from its first element on."""
    meta = _read_meta(stream)
    stream.seek(_PREAMBLE_BYTES + len(_MAGIC) + _GROUP_LENGTH_BYTES + int(meta.FileMetaInformationGroupLength))
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(stream.read(), MAX_INFLATED_BYTES)
    if not inflater.eof:
        raise ValueError(f"the deflated dataset is truncated or larger than {MAX_INFLATED_BYTES} bytes")
    return BytesIO(inflated)


def _is_deflated(head: bytes) -> bool:
    named = DeflatedExplicitVRLittleEndian.encode() in head[:_META_SEARCH_BYTES]
    return named and _read_meta(BytesIO(head)).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian


def _read_meta(stream: BinaryIO) -> Dataset:
    """The file meta information: everything up to the first element that is not of group 2."""
    stream.seek(_PREAMBLE_BYTES + len(_MAGIC))
    return read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)


def _at_pixel_data(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag in _PIXEL_DATA_TAGS


def _guessed_syntax(dataset: Dataset) -> UID:
    implicit, little_endian = dataset.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian


class Attributes:
    """The attributes of one frame, wherever they lie: in its functional groups, in the shared ones, in the header."""

    def __init__(self, datasets: Iterable[Dataset]) -> None:
        self._datasets = tuple(datasets)

    def get(self, keyword: str) -> Any:
        """The first value that is there and not empty, else None."""
        tag, dictionary_vr = _entry(keyword)
        for dataset in self._datasets:
            element = dataset.get_item(tag)
            value = None if element is None else _value(element, dictionary_vr, dataset)
            if not _is_empty(value):
                return value
        return None

    def text(self, keyword: str) -> str:
        """The value as text; empty if it is not there."""
        value = self.get(keyword)
        return "" if value is None else str(value).strip()

    def texts(self, keyword: str) -> tuple[str, ...]:
        """The values of a multi-valued text."""
        value = self.get(keyword)
        values = (value,) if isinstance(value, str) else value or ()
        return tuple(str(part).strip().upper() for part in values)

    def integer(self, keyword: str) -> int | None:
        """The value as a whole number. Raises ValueError or TypeError if it is none."""
        value = self.get(keyword)
        return None if value is None else _whole(value)

    def number(self, keyword: str) -> float | None:
        """The value as a finite number. Raises ValueError or TypeError if it is none."""
        value = self.get(keyword)
        return None if value is None else _finite(value)

    def numbers(self, keyword: str, count: int) -> tuple[float, ...] | None:
        """``count`` finite numbers. Raises ValueError if there are more or fewer."""
        value = self.get(keyword)
        if value is None:
            return None
        numbers = tuple(map(_finite, (value,) if isinstance(value, str) else value))
        if len(numbers) != count:
            raise ValueError(f"{keyword} holds {len(numbers)} numbers instead of {count}")
        return numbers


@cache
def _entry(keyword: str) -> tuple[BaseTag, str]:
    """The tag, and the value representation that PS3.6 gives it."""
    tag = Tag(keyword)
    return tag, dictionary_VR(tag)


def _value(element: RawDataElement | DataElement, dictionary_vr: str, dataset: Dataset) -> Any:
    """The value of an element of ``dataset``: texts and 16-bit integers are read here, all else by pydicom.

    pydicom checks such a value against its representation and keeps it in a class of its own: that takes ten times as
    long. Numbers in texts stay texts. The attributes that are read hold no letters beyond ASCII.
    """
    if isinstance(element, RawDataElement) and isinstance(element.value, bytes):
        vr = dictionary_vr if element.VR in (None, "UN") else element.VR
        if vr in _TEXTS:
            parts = [part.strip(" \0") for part in element.value.decode("latin-1").split("\\")]
            return parts[0] if len(parts) == 1 else parts
        if (vr, element.is_little_endian) in _SHORTS and len(element.value) == 2:
            return struct.unpack(_SHORTS[vr, element.is_little_endian], element.value)[0]
    return dataset[element.tag].value


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, Sized) and len(value) == 0)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("a number is not finite")
    return number


def _whole(value: Any) -> int:
    try:
        return int(value)
    except ValueError:  # some writers put 3.0 where a whole number belongs
        number = _finite(value)
        if number != int(number):
            raise
        return int(number)
