"""What a compressed slice says of itself, held against the DICOM header before a decoder sees it.

The decoders are C libraries that size their output by the codestream: a damaged one would make them allocate gigabytes,
or write past a buffer. A codestream that contradicts its header is refused instead.
"""

from __future__ import annotations

import struct
from typing import Final

from pydicom.uid import UID, JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes, JPEGTransferSyntaxes

from groundglass_client.intake.jpeg import JpegError, read_frame_header

_J2K_START: Final = b"\xff\x4f\xff\x51"
_J2K_SIZES: Final = struct.Struct(">HHLLLLLLLLHBBB")
_HTJ2K_PREFIX: Final = "1.2.840.10008.1.2.4.20"

Shape = tuple[int, int, int, int]
"""Rows, columns, components, bits of precision."""


def check_codestream(encoded: bytes, syntax: UID, rows: int, columns: int, bits_allocated: int) -> None:
    """Raise ValueError, in words for a person, if a codestream of the JPEG family contradicts its DICOM header."""
    if syntax in JPEG2000TransferSyntaxes or syntax.startswith(_HTJ2K_PREFIX):
        shape = _j2k_shape(encoded)
    elif syntax in JPEGTransferSyntaxes or syntax in JPEGLSTransferSyntaxes:
        frame = read_frame_header(encoded)
        shape = frame.rows, frame.columns, frame.components, frame.precision_bits
    else:
        return
    if shape[:3] != (rows, columns, 1) or not 1 < shape[3] <= bits_allocated:
        raise JpegError(
            f"its codestream holds {shape[0]} x {shape[1]} pixels of {shape[2]} components and {shape[3]} bits, "
            f"its header says {rows} x {columns} of one in {bits_allocated}"
        )


def _j2k_shape(encoded: bytes) -> Shape:
    """The SIZ marker segment (ITU-T T.800 A.5.1). Some files wrap the codestream in a JP2 box: it may start later."""
    start = encoded.find(_J2K_START)
    if start < 0 or len(encoded) < start + len(_J2K_START) + _J2K_SIZES.size:
        raise JpegError("its codestream is damaged: no JPEG 2000 header")
    sizes = _J2K_SIZES.unpack_from(encoded, start + len(_J2K_START))
    right, bottom, left, top, components, depth, *steps = *sizes[2:6], *sizes[10:]
    if steps != [1, 1]:
        raise JpegError("its codestream is damaged: subsampled grey pixels")
    return bottom - top, right - left, components, (depth & 0x7F) + 1
