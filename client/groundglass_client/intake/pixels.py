"""Slice source -> Hounsfield units."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, ExplicitVRLittleEndian

from groundglass.errors import UnreadableFile
from groundglass.study import SliceSource
from groundglass_client.intake.attributes import inflate
from groundglass_client.intake.decoders import PLUGINS
from groundglass_client.intake.hounsfield import rescale, unwindow
from groundglass_client.intake.pictures import read_grey
from groundglass_client.intake.quiet import quiet
from groundglass_client.intake.slices import DicomSlice, PictureSlice


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
    # Every decoder has its own errors, and a damaged codestream may raise any of them.
    except Exception as error:
        raise UnreadableFile(f"{_place(source)}: its pixels can't be decoded ({_last_line(error)})") from error


def _stored_values(source: DicomSlice) -> NDArray[Any]:
    """The integers of the file, (rows, columns): bits that carry no value are taken off, the sign is applied."""
    pixels = source.pixels
    syntax = UID(pixels.transfer_syntax_uid)
    encoded = _read(source)
    values, _ = get_decoder(ExplicitVRLittleEndian if pixels.deflated else syntax).as_array(
        encapsulate([encoded]) if syntax.is_encapsulated else encoded,
        index=0,
        raw=True,
        decoding_plugin=PLUGINS.get(syntax, ""),
        **_options(source),
    )
    return values >> (pixels.high_bit + 1 - pixels.bits_stored)


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


def _last_line(error: Exception) -> str:
    """What the decoder said: pydicom puts a heading of its own above it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:200] if lines else type(error).__name__
