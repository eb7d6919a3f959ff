"""What a compressed slice says of itself, held against the DICOM header before a decoder sees it.

The decoders are C libraries that size their output by the codestream: a damaged one would make them allocate gigabytes,
or read and write past a buffer. A codestream that contradicts its header is refused instead.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Final

from pydicom.uid import UID, JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes, JPEGTransferSyntaxes

from groundglass_client.intake.jpeg import JpegError, read_frame_header

J2K_START: Final = b"\xff\x4f\xff\x51"
_J2K_SIZES: Final = struct.Struct(">HHLLLLLLLLHBBB")
_HTJ2K_PREFIX: Final = "1.2.840.10008.1.2.4.20"
_RLE_HEADER: Final = struct.Struct("<16L")

Shape = tuple[int, int, int, int]
"""Rows, columns, components, bits of precision."""


def check_codestream(encoded: bytes, syntax: UID, rows: int, columns: int, bits_allocated: int) -> int | None:
    """The bits of precision that a JPEG-LS or JPEG 2000 codestream declares: its sign, if any, is the topmost of them.

    None for other syntaxes, where the header says so. Raises ValueError, in words for a person, if the codestream
    contradicts its DICOM header.
    """
    j2k = syntax in JPEG2000TransferSyntaxes or syntax.startswith(_HTJ2K_PREFIX)
    if j2k:
        shape = _j2k_shape(encoded)
    elif syntax in JPEGTransferSyntaxes or syntax in JPEGLSTransferSyntaxes:
        frame = read_frame_header(encoded)
        shape = frame.rows, frame.columns, frame.components, frame.precision_bits
    else:
        return None
    if shape[:3] != (rows, columns, 1) or not 1 < shape[3] <= bits_allocated:
        raise JpegError(
            f"its codestream holds {shape[0]} x {shape[1]} pixels of {shape[2]} components and {shape[3]} bits, "
            f"its header says {rows} x {columns} of one in {bits_allocated}"
        )
    return shape[3] if j2k or syntax in JPEGLSTransferSyntaxes else None


def _j2k_shape(encoded: bytes) -> Shape:
    """The SIZ marker segment (ITU-T T.800 A.5.1). Some files wrap the codestream in a JP2 box: it may start later."""
    start = encoded.find(J2K_START)
    if start < 0 or len(encoded) < start + len(J2K_START) + _J2K_SIZES.size:
        raise JpegError("its codestream is damaged: no JPEG 2000 header")
    sizes = _J2K_SIZES.unpack_from(encoded, start + len(J2K_START))
    right, bottom, left, top, components, depth, *steps = *sizes[2:6], *sizes[10:]
    if steps != [1, 1]:
        raise JpegError("its codestream is damaged: subsampled grey pixels")
    return bottom - top, right - left, components, (depth & 0x7F) + 1


def rle_planes(encoded: bytes, count: int) -> list[bytes]:
    """The segments of an RLE slice (PS3.5 G.5), one per byte of a pixel. Raises ValueError for a damaged header."""
    if len(encoded) < _RLE_HEADER.size:
        raise ValueError("its RLE data is shorter than its header")
    found, *offsets = _RLE_HEADER.unpack_from(encoded)
    bounds = [*offsets[:count], len(encoded)]
    if found != count or bounds[0] != _RLE_HEADER.size or any(start >= end for start, end in pairwise(bounds)):
        raise ValueError("its RLE header is damaged")
    return [encoded[start:end] for start, end in pairwise(bounds)]
