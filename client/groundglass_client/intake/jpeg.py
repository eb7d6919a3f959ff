"""The marker segments of a JPEG codestream, checked as strictly as the standard allows (ITU-T T.81 annex B).

Decoders of lossless JPEG end the whole process on some damaged headers, by an abort or a write past a buffer, and fill
up what is missing of damaged data without a word: so both are looked at here first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

_START_OF_IMAGE: Final = b"\xff\xd8"
_END_OF_IMAGE: Final = 0xD9
_START_OF_SCAN: Final = 0xDA
_HUFFMAN_TABLES: Final = 0xC4
_LOSSLESS: Final = 0xC3
_JPEG_LS: Final = 0xF7
_FRAME_HEADERS: Final = frozenset({0xC0, 0xC1, 0xC2, _LOSSLESS, _JPEG_LS})
_HARMLESS: Final = frozenset({*range(0xE0, 0xF0), 0xFE, 0xDB, 0xF8})
"""Application data, comments, quantisation tables, JPEG-LS parameters."""

_RESTART_INTERVAL: Final = 0xDD
_LONGEST_CODE_BITS: Final = 16


class JpegError(ValueError):
    """The codestream breaks the standard. The text says how, for a person."""


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What the start-of-frame segment declares."""

    marker: int
    precision_bits: int
    rows: int
    columns: int
    components: int


def read_frame_header(codestream: bytes) -> FrameHeader:
    """The frame header of a codestream. Raises JpegError if a segment before the data is damaged or the end missing."""
    frame: FrameHeader | None = None
    tables: set[int] = set()
    for marker, segment, end in _segments(codestream):
        if marker in _FRAME_HEADERS:
            _require(frame is None, "two frame headers")
            frame = _frame_header(marker, segment)
        elif marker == _HUFFMAN_TABLES:
            tables |= set(_huffman_tables(segment))
        elif marker == _START_OF_SCAN:
            _require(frame is not None, "a scan before the frame header")
            assert frame is not None  # noqa: S101 - for the type checker: required in the line above
            if frame.marker == _LOSSLESS:
                _check_lossless_scan(segment, tables, frame)
            _check_end(codestream, end, one_scan=frame.marker == _LOSSLESS)
            return frame
        else:
            _require(marker in _HARMLESS or (marker == _RESTART_INTERVAL and len(segment) == 2), f"marker {marker:02x}")
    raise JpegError("its codestream ends before the scan")


def _require(sound: bool, found: str) -> None:
    if not sound:
        raise JpegError(f"its codestream is damaged: {found}")


def _segments(codestream: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Marker, content and end of every segment up to the scan's header."""
    _require(codestream.startswith(_START_OF_IMAGE), "no start of image")
    at = len(_START_OF_IMAGE)
    while at + 4 <= len(codestream):
        start, marker, length = struct.unpack_from(">BBH", codestream, at)
        end = at + 2 + length
        _require(start == 0xFF and length >= 2 and end <= len(codestream), f"no segment at byte {at}")
        yield marker, codestream[at + 4 : end], end
        at = end


def _frame_header(marker: int, segment: bytes) -> FrameHeader:
    _require(len(segment) == 9, "a frame header that is not of one component")
    precision, rows, columns, components, _, sampling, _ = struct.unpack(">BHHBBBB", segment)
    _require(
        components == 1 and (sampling == 0x11 or marker != _LOSSLESS) and 2 <= precision <= 16,
        "a frame header of other than grey pixels",
    )
    return FrameHeader(marker, precision, rows, columns, components)


def _huffman_tables(segment: bytes) -> Iterator[int]:
    """Destinations of the tables of a DHT segment, each checked to be a prefix code."""
    at = 0
    while at < len(segment):
        counts = segment[at + 1 : at + 1 + _LONGEST_CODE_BITS]
        space = sum(count << (_LONGEST_CODE_BITS - bits) for bits, count in enumerate(counts, start=1))
        end = at + 1 + _LONGEST_CODE_BITS + sum(counts)
        _require(len(counts) == _LONGEST_CODE_BITS and end <= len(segment), "a cut Huffman table")
        _require(0 < space <= 1 << _LONGEST_CODE_BITS, "a Huffman table that is no code")
        values = segment[at + 1 + _LONGEST_CODE_BITS : end]
        _require(segment[at] & 0xEC == 0 and len(set(values)) == len(values), "a Huffman table without place or values")
        yield segment[at] if max(values) <= _LONGEST_CODE_BITS else -1
        at = end


def _check_lossless_scan(segment: bytes, tables: set[int], frame: FrameHeader) -> None:
    """Ss is the predictor, Al the point transform; both others are 0 (T.81 table B.3)."""
    _require(len(segment) == 6 and segment[0] == 1, "a scan that is not of one component")
    table, predictor, end, shift = segment[2] >> 4, *segment[3:6]
    _require(table in tables, "a scan without a Huffman table for differences")
    _require(1 <= predictor <= 7 and end == 0 and shift < frame.precision_bits, "a scan without predictor")


def _check_end(codestream: bytes, start: int, *, one_scan: bool) -> None:
    """The entropy-coded data must run to an end of image: cut data would decode to a picture that is partly made up."""
    if one_scan:
        _require(_next_marker(codestream, start) == _END_OF_IMAGE, "its data does not end where the image does")
    else:
        _require(codestream.rfind(b"\xff\xd9") > start, "its end is missing")


def _next_marker(codestream: bytes, start: int) -> int | None:
    """The first marker in the entropy-coded data from ``start`` on. A regular expression takes 1.7 ms a slice."""
    data = np.frombuffer(codestream, np.uint8, offset=start)
    behind_ff = data[1:][data[:-1] == 0xFF]
    no_marker = (behind_ff == 0x00) | (behind_ff == 0xFF) | (behind_ff & 0xF8 == 0xD0)  # stuffed, fill byte, restart
    markers = behind_ff[~no_marker]
    return int(markers[0]) if markers.size else None
