"""Slice source -> Hounsfield units."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, ExplicitVRLittleEndian

from groundglass.errors import UnreadableFile
from groundglass.study import SliceSource
from groundglass_client.intake.attributes import inflate
from groundglass_client.intake.codestream import check_codestream
from groundglass_client.intake.decoders import LOSSLESS_JPEG, LOSSY_JPEG, PLUGINS, decode_jpeg
from groundglass_client.intake.hounsfield import rescale, unwindow
from groundglass_client.intake.pictures import read_grey
from groundglass_client.intake.quiet import quiet
from groundglass_client.intake.slices import DicomSlice, PictureSlice, StoredPixels

_RUST_PANIC: Final = "PanicException"


def decode_hu(source: SliceSource) -> NDArray[np.int16]:
    """Hounsfield units of one slice of an open study: int16 (rows, columns), at least -1024 for DICOM.

    It reads only the bytes of that slice, keeps no state and may run in any number of threads or processes. An 8-bit
    picture gives the units that the lung window maps to its greys. Raises UnreadableFile, naming the file, if the
    pixels are damaged.
    """
    if isinstance(source, PictureSlice):
        return unwindow(read_grey(source.path, source.file))
    if not isinstance(source, DicomSlice):
        raise TypeError(f"decode_hu takes the slices of open_study, not {type(source).__name__}")
    try:
        with quiet():
            stored = _stored_values(source)
        return rescale(stored, source.pixels.slope, source.pixels.intercept_hu, source.pixels.padding)
    # Every decoder has its own errors, and a damaged codestream may raise any of them. The RLE decoder is written in
    # Rust: its errors include panics, and a panic is no Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _RUST_PANIC:
            raise
        raise UnreadableFile(f"{_place(source)}: its pixels can't be decoded ({_last_line(error)})") from error


def _stored_values(source: DicomSlice) -> NDArray[Any]:
    """The integers of the file, (rows, columns): bits that carry no value are taken off, the sign is applied."""
    pixels = source.pixels
    syntax = UID(pixels.transfer_syntax_uid)
    encoded = _read(source)
    check_codestream(encoded, syntax, source.rows, source.columns, pixels.bits_allocated)
    if syntax in LOSSY_JPEG or syntax in LOSSLESS_JPEG:
        values = _with_sign(decode_jpeg(encoded, syntax), pixels)
    else:
        values = _decode_by_pydicom(source, syntax, encoded)
    if values.shape != (source.rows, source.columns):
        raise ValueError(f"the decoder gave {values.shape} pixels instead of {source.rows} x {source.columns}")
    return values >> (pixels.high_bit + 1 - pixels.bits_stored)


def _with_sign(unsigned: NDArray[Any], pixels: StoredPixels) -> NDArray[Any]:
    """A codestream knows no sign: the topmost of the bits in use is one if the header says so."""
    unused = 8 * unsigned.dtype.itemsize - (pixels.high_bit + 1)
    values = unsigned.view(f"i{unsigned.dtype.itemsize}") if pixels.signed else unsigned
    return (values << unused) >> unused


def _decode_by_pydicom(source: DicomSlice, syntax: UID, encoded: bytes) -> NDArray[Any]:
    values, _ = get_decoder(ExplicitVRLittleEndian if source.pixels.deflated else syntax).as_array(
        encapsulate([encoded]) if syntax.is_encapsulated else encoded,
        index=0,
        raw=True,
        decoding_plugin=PLUGINS.get(syntax, ""),
        **_options(source),
    )
    return values


def _options(source: DicomSlice) -> dict[str, Any]:
    pixels = source.pixels
    return {
        "rows": source.rows,
        "columns": source.columns,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "photometric_interpretation": pixels.photometric,
        "pixel_representation": int(pixels.signed),
        "bits_allocated": pixels.bits_allocated,
        # pydicom takes the value from the lowest bits: what lies below it (early overlays) is shifted out afterwards.
        "bits_stored": pixels.high_bit + 1,
        "pixel_keyword": "PixelData",
        "pixel_vr": pixels.value_representation,
    }


def _read(source: DicomSlice) -> bytes:
    with source.path.open("rb") as stream:
        content = inflate(stream) if source.pixels.deflated else stream
        return b"".join(_read_span(content, offset, length) for offset, length in source.pixels.spans)


def _read_span(content: Any, offset: int, length: int) -> bytes:
    content.seek(offset)
    read: bytes = content.read(length)
    if len(read) < length:
        raise ValueError("the file was cut short after it was opened")
    return read


def _place(source: SliceSource) -> str:
    return f"{source.file}, frame {source.frame + 1}" if source.frame else source.file


def _last_line(error: BaseException) -> str:
    """What the decoder said: pydicom puts a heading of its own above it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:200] if lines else type(error).__name__
