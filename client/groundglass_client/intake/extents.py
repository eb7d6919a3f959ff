"""Where the encoded bytes of each frame lie in a file, found without reading them (DICOM PS3.5 section 8, annex
A.4)."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO, Final

from pydicom.uid import UID

Span = tuple[int, int]
"""Offset and length, in bytes."""

_ITEM: Final = 0xE000FFFE
_SEQUENCE_END: Final = 0xE0DDFFFE
_PIXEL_DATA: Final = 0x00107FE0
_UNDEFINED: Final = 0xFFFFFFFF
_LONG_HEADER_VRS: Final = frozenset({b"OB", b"OW", b"UN", b"OF", b"OD", b"UT"})
_END_OF_IMAGE: Final = b"\xff\xd9"
_TAIL_BYTES: Final = 10
"""A codestream ends with its end marker, or with that and a few bytes of padding."""


@dataclass(frozen=True, slots=True)
class PixelElement:
    """The value of the pixel data element: its start, its length (None: encapsulated), its value representation."""

    offset: int
    length: int | None
    value_representation: str


class ExtentError(Exception):
    """The pixel data can't hold what the header promises. The text says why, for a person."""


def find_pixel_element(stream: BinaryIO, syntax: UID) -> PixelElement:
    """The pixel data's element, at which ``stream`` stands. Raises ExtentError if there is none, or not of integers."""
    order = "<" if syntax.is_little_endian else ">"
    head = stream.read(8)
    if len(head) < 8:
        raise ExtentError("it holds no pixel data, or is truncated before it")
    group, element = struct.unpack(order + "HH", head[:4])
    if (group, element) != (0x7FE0, 0x0010):
        raise ExtentError("its pixels are floating point numbers; CT pixels are integers")
    if syntax.is_implicit_VR:
        (length,), vr = struct.unpack(order + "L", head[4:]), "OW"
    else:
        vr = head[4:6].decode("ascii", "replace")
        (length,) = struct.unpack(order + "L", _exactly(stream, 4))
    return PixelElement(stream.tell(), None if length == _UNDEFINED else length, vr)


def native_spans(stream: BinaryIO, element: PixelElement, frame_count: int, frame_bytes: int) -> tuple[Span, ...]:
    """Spans of frames that lie uncompressed, one behind the other. Raises ExtentError if bytes are missing."""
    if element.length is None:
        raise ExtentError("its pixel data is encapsulated, though its transfer syntax says uncompressed")
    held = min(element.length, _size(stream) - element.offset)
    if held < frame_count * frame_bytes:
        raise ExtentError(f"it holds {held} bytes of pixel data instead of {frame_count * frame_bytes}: truncated")
    return tuple((element.offset + index * frame_bytes, frame_bytes) for index in range(frame_count))


def encapsulated_spans(
    stream: BinaryIO, element: PixelElement, frame_count: int, extended_offsets: bytes | None
) -> tuple[tuple[Span, ...], ...]:
    """The spans of the fragments of every frame. Raises ExtentError if fragments are missing or can't be assigned."""
    if element.length is not None:
        raise ExtentError("its pixel data is not encapsulated, though its transfer syntax says compressed")
    stream.seek(element.offset)
    (table_offset, table_length), *fragments = _items(stream)
    if not fragments:
        raise ExtentError("its pixel data holds no fragment")
    if frame_count == 1:
        return (tuple(fragments),)
    if len(fragments) == frame_count:
        return tuple((fragment,) for fragment in fragments)
    starts = _frame_starts(stream, table_offset, table_length, extended_offsets)
    groups = _split_at(fragments, starts) if starts else _split_at_end_markers(stream, fragments)
    if len(groups) != frame_count or not all(groups):
        raise ExtentError(f"its pixel data holds {len(groups)} frames instead of {frame_count}")
    return groups


def _items(stream: BinaryIO) -> list[Span]:
    """Every item up to the end of the sequence; the first one is the Basic Offset Table."""
    size = _size(stream)
    items: list[Span] = []
    while True:
        tag, length = struct.unpack("<LL", _exactly(stream, 8))
        if tag == _SEQUENCE_END and items:
            return items
        if tag != _ITEM or length == _UNDEFINED or stream.tell() + length > size:
            raise ExtentError("its compressed pixel data is truncated or broken")
        items.append((stream.tell(), length))
        stream.seek(length, io.SEEK_CUR)


def _frame_starts(stream: BinaryIO, table_offset: int, table_length: int, extended: bytes | None) -> list[int]:
    """Absolute offsets of the first fragment of each frame; empty if the file has no table."""
    # Tables count from the item tag of the first fragment; spans start behind that tag and its length.
    base = table_offset + table_length + 8
    if extended:
        return [base + start for (start,) in struct.iter_unpack("<Q", extended)]
    stream.seek(table_offset)
    return [base + start for (start,) in struct.iter_unpack("<L", _exactly(stream, table_length))]


def _split_at(fragments: list[Span], starts: list[int]) -> tuple[tuple[Span, ...], ...]:
    return tuple(
        tuple(fragment for fragment in fragments if start <= fragment[0] < end)
        for start, end in pairwise([*starts, _UNDEFINED << 32])
    )


def _split_at_end_markers(stream: BinaryIO, fragments: list[Span]) -> tuple[tuple[Span, ...], ...]:
    frames: list[list[Span]] = [[]]
    for offset, length in fragments:
        frames[-1].append((offset, length))
        stream.seek(max(offset, offset + length - _TAIL_BYTES))
        if _END_OF_IMAGE in stream.read(min(length, _TAIL_BYTES)):
            frames.append([])
    return tuple(tuple(frame) for frame in frames if frame)


def _exactly(stream: BinaryIO, count: int) -> bytes:
    read = stream.read(count)
    if len(read) < count:
        raise ExtentError("it is truncated")
    return read


def _size(stream: BinaryIO) -> int:
    here = stream.tell()
    size = stream.seek(0, io.SEEK_END)
    stream.seek(here)
    return size
