"""Which decoder reads which transfer syntax, and why a syntax can't be read.

One decoder per syntax, so that every machine decodes a study the same way: the fastest of those that are free to use,
survive damaged input behind the checks of ``codestream`` (12,000 damaged codestreams each, 2026, no crash and no hang),
and let other threads run meanwhile. What was left out, and why:

- GDCM ends the process on some damaged lossless JPEGs.
- pylibjpeg (RLE, JPEG 2000) and pyjpegls hold the GIL: two threads decode no more than one. pydicom, through which they
  are called, loops for ever on some damaged JP2 boxes.
- imagecodecs' jpegsof3 takes 2.6 times as long as libjpeg-turbo, and writes into its input. Its ljpeg (liblj92) is no
  faster, and its older releases write past their tables on damaged data.
- imagecodecs' htj2k (OpenJPH) is 1.8 times as fast as OpenJPEG, but missing in the oldest release that we allow.

Decode in threads, not in processes: the decoders leave the GIL, so that two threads keep two cores busy on JPEG
Lossless, JPEG-LS and JPEG 2000 for the CPU time of one, while the pixels that a process sends back cost 1 to 3 ms of
CPU time a slice more (benchmarks/results/decoders.md). Raw pixels and RLE gain less by threads, at half a millisecond
and one. Headers gain nothing: they are parsed in Python (two threads take a third longer than one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from groundglass_client.intake.codestream import J2K_START, rle_planes

_NATIVE: Final = frozenset(
    {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian}
)


def _decode_j2k(encoded: bytes) -> NDArray[Any]:
    """The codestream alone: a JP2 box around it, which DICOM forbids, could carry a colour profile to apply."""
    values: NDArray[Any] = imagecodecs.jpeg2k_decode(encoded[encoded.find(J2K_START) :])
    return values


def _decode_rle(encoded: bytes, pixels: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Planes of bytes, the highest first (PS3.5 annex G). Writers pad them: what lies behind the last pixel is left.

    imagecodecs' dicomrle takes 0.1 ms less and refuses that padding.
    """
    values = np.zeros(pixels, dtype)
    for plane in rle_planes(encoded, dtype.itemsize):
        values <<= 8 if dtype.itemsize > 1 else 0
        values |= np.frombuffer(imagecodecs.packbits_decode(plane), np.uint8, count=pixels)
    return values


_CODESTREAMS: Final[Mapping[str, Callable[..., NDArray[Any]]]] = MappingProxyType(
    {
        JPEGBaseline8Bit: imagecodecs.jpeg8_decode,
        JPEGExtended12Bit: imagecodecs.jpeg8_decode,
        JPEGLossless: imagecodecs.jpeg8_decode,
        JPEGLosslessSV1: imagecodecs.jpeg8_decode,
        JPEGLSLossless: imagecodecs.jpegls_decode,
        JPEGLSNearLossless: imagecodecs.jpegls_decode,
        JPEG2000Lossless: _decode_j2k,
        JPEG2000: _decode_j2k,
        HTJ2KLossless: _decode_j2k,
        HTJ2KLosslessRPCL: _decode_j2k,
        HTJ2K: _decode_j2k,
    }
)


def decode(encoded: bytes, syntax: UID, pixels: int, bits_allocated: int, value_representation: str) -> NDArray[Any]:
    """The integers of a slice of so many ``pixels``, in any shape, as they are coded: the sign is not applied yet."""
    if syntax in _CODESTREAMS:
        return _CODESTREAMS[syntax](encoded)
    little_endian = np.dtype(f"<u{bits_allocated // 8}")
    if syntax == RLELossless:
        return _decode_rle(encoded, pixels, little_endian)
    if syntax != ExplicitVRBigEndian:
        return np.frombuffer(encoded, little_endian)
    if bits_allocated == 8 and value_representation == "OW":  # words of two pixels, swapped like every word
        return np.frombuffer(encoded, np.uint16).byteswap().view(np.uint8)
    return np.frombuffer(encoded, little_endian.newbyteorder()).astype(little_endian)


def decoder_refusal(syntax: UID) -> str | None:
    """Why pixels in ``syntax`` can't be decoded, in words for a person; None if they can."""
    if syntax in _CODESTREAMS or syntax in _NATIVE or syntax == RLELossless:
        return None
    name = "an unknown transfer syntax" if syntax.name == syntax else f"the transfer syntax {syntax.name}"
    return f"its pixels are in {name} ({syntax}), which no decoder here reads"
