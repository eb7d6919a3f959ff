"""Which decoder reads which transfer syntax, and why a syntax can't be read.

One decoder per syntax, the fastest of those whose licence fits (measured in 2026 on a 512x512 slice of 12 bits):
so that every machine decodes a study the same way.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

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

NATIVE: Final = frozenset(
    {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian}
)

PLUGINS: Final = MappingProxyType(
    {
        JPEGBaseline8Bit: "gdcm",
        JPEGExtended12Bit: "gdcm",
        JPEGLossless: "gdcm",
        JPEGLosslessSV1: "gdcm",
        JPEGLSLossless: "pyjpegls",
        JPEGLSNearLossless: "pyjpegls",
        JPEG2000Lossless: "pylibjpeg",
        JPEG2000: "pylibjpeg",
        HTJ2KLossless: "pylibjpeg",
        HTJ2KLosslessRPCL: "pylibjpeg",
        HTJ2K: "pylibjpeg",
        RLELossless: "pylibjpeg",
    }
)
"""pydicom's name of the plugin that decodes a transfer syntax."""


def decoder_refusal(syntax: UID, bits_stored: int | None) -> str | None:
    """Why pixels in ``syntax`` can't be decoded, in words for a person; None if they can."""
    if syntax == JPEGExtended12Bit and bits_stored != 8:
        return f"its pixels are in the transfer syntax {syntax.name} ({syntax}), which is read with 8 bits only"
    if syntax in NATIVE or syntax in PLUGINS:
        return None
    name = "an unknown transfer syntax" if syntax.name == syntax else f"the transfer syntax {syntax.name}"
    return f"its pixels are in {name} ({syntax}), which no decoder here reads"
