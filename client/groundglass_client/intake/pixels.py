"""Slice source -> Hounsfield units."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import UID

from groundglass.errors import UnreadableFile
from groundglass.study import SliceSource
from groundglass_client.intake.attributes import inflate
from groundglass_client.intake.codestream import check_codestream
from groundglass_client.intake.decoders import decode
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
        stored = _stored_values(source)
        return rescale(stored, source.pixels.slope, source.pixels.intercept_hu, source.pixels.padding)
    except Exception as error:  # every decoder has its own errors, and a damaged codestream may raise any of them
        raise UnreadableFile(f"{_place(source)}: its pixels can't be decoded ({_last_line(error)})") from error


def _stored_values(source: DicomSlice) -> NDArray[Any]:
    """The integers of the file, (rows, columns): bits that carry no value are taken off, the sign is applied."""
    pixels, shape = source.pixels, (source.rows, source.columns)
    syntax, count = UID(pixels.transfer_syntax_uid), source.rows * source.columns
    encoded = _read(source)
    precision = check_codestream(encoded, syntax, *shape, pixels.bits_allocated)
    values = decode(encoded, syntax, count, pixels.bits_allocated, pixels.value_representation)
    if values.shape not in (shape, (count,)):
        raise ValueError(f"the decoder gave {values.shape} pixels instead of {source.rows} x {source.columns}")
    unused_below = pixels.high_bit + 1 - pixels.bits_stored
    return _in_use(values.reshape(shape), precision or pixels.high_bit + 1, unused_below, signed=pixels.signed)


def _in_use(values: NDArray[Any], top: int, unused_below: int, *, signed: bool) -> NDArray[Any]:
    """The bits of ``values`` below ``top`` (early overlays lie above) without so many at the bottom.

    The topmost of them is a sign if the header says so, whatever the codestream says.
    """
    typed = values.view(f"{'i' if signed else 'u'}{values.dtype.itemsize}")
    unused_above = max(0, 8 * values.dtype.itemsize - top)
    if unused_above or unused_below:
        typed = typed << unused_above
        typed >>= unused_above + unused_below
    return typed


def _read(source: DicomSlice) -> bytes:
    with source.path.open("rb") as stream:
        content = _inflated(stream) if source.pixels.deflated else stream
        return b"".join([_read_span(content, offset, length) for offset, length in source.pixels.spans])


def _inflated(stream: BinaryIO) -> BinaryIO:
    with quiet():  # pydicom finds the dataset in the file
        return inflate(stream)


def _read_span(content: BinaryIO, offset: int, length: int) -> bytes:
    content.seek(offset)
    read: bytes = content.read(length)
    if len(read) < length:
        raise ValueError("the file was cut short after it was opened")
    return read


def _place(source: SliceSource) -> str:
    return f"{source.file}, frame {source.frame + 1}" if source.frame else source.file


def _last_line(error: BaseException) -> str:
    """What the decoder said, in one line."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:200] if lines else type(error).__name__
