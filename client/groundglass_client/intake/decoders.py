"""Which decoder reads which transfer syntax, and why a syntax can't be read.

One decoder per syntax, so that every machine decodes a study the same way: the fastest of those that are free to use,
survive damaged input behind the checks of ``codestream``, and let other threads run meanwhile (measured in 2026). GDCM
does neither of the last two: it ends the process on some damaged lossless JPEGs.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

import imagecodecs
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

NATIVE: Final = frozenset(
    {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian}
)

PLUGINS: Final = MappingProxyType(
    {
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

LOSSY_JPEG: Final = frozenset({JPEGBaseline8Bit, JPEGExtended12Bit})
LOSSLESS_JPEG: Final = frozenset({JPEGLossless, JPEGLosslessSV1})


def decode_jpeg(codestream: bytes, syntax: UID) -> NDArray[Any]:
    """Unsigned integers (rows, columns) of a JPEG codestream in one of the two groups of syntaxes above."""
    decode = imagecodecs.jpegsof3_decode if syntax in LOSSLESS_JPEG else imagecodecs.jpeg8_decode
    values: NDArray[Any] = decode(codestream)
    return values


def decoder_refusal(syntax: UID) -> str | None:
    """Why pixels in ``syntax`` can't be decoded, in words for a person; None if they can."""
    if any(syntax in known for known in (NATIVE, PLUGINS, LOSSY_JPEG, LOSSLESS_JPEG)):
        return None
    name = "an unknown transfer syntax" if syntax.name == syntax else f"the transfer syntax {syntax.name}"
    return f"its pixels are in {name} ({syntax}), which no decoder here reads"
