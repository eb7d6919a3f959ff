"""DICOM file -> frames: what the header says of each slice, and where the slice's pixels lie.

Only the attributes that intake needs are parsed. A patient's name or ID is never among them, so it can't reach a
message, a log or a report.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, Final, cast

from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

from groundglass.errors import NotACtSlice, StudyError, UnreadableFile
from groundglass_client.intake.attributes import Attributes, Header, read_header
from groundglass_client.intake.decoders import decoder_refusal
from groundglass_client.intake.extents import ExtentError, Span, encapsulated_spans, find_pixel_element, native_spans
from groundglass_client.intake.geometry import slice_normal
from groundglass_client.intake.quiet import quiet
from groundglass_client.intake.slices import MAX_PIXELS_PER_SLICE, FoundFile, Frame, StoredPixels, Vector

MAX_FRAMES: Final = 1 << 16

_CT_CLASSES: Final = frozenset({CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage})
_GREY: Final = frozenset({"MONOCHROME1", "MONOCHROME2"})
_HU: Final = frozenset({"", "HU", "HU_MOD"})
_UNSPECIFIED: Final = "US"
_BITS_ALLOCATED: Final = frozenset({8, 16, 32})

_KEYWORDS: Final = (
    "SpecificCharacterSet",
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "SeriesInstanceUID",
    "SeriesNumber",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SliceLocation",
    "PixelSpacing",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable",
)
_TAGS: Final = tuple(int(Tag(keyword)) for keyword in _KEYWORDS)
_FRAME_GROUPS: Final = (
    "CTImageFrameTypeSequence",
    "FrameContentSequence",
    "PixelMeasuresSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelValueTransformationSequence",
)
"""The functional groups (PS3.3 C.7.6.16.2, C.8.15.3) that hold attributes of one frame."""


def read_frames(file: FoundFile) -> tuple[Frame, ...]:
    """The slices that a DICOM file holds: one, or one per frame of a multi-frame object.

    A localizer, which is a CT image but no slice through the body, comes back as one frame that says so. Raises
    UnreadableFile if the file is broken or can't be decoded here, GeometryError if its orientation is none,
    NotACtSlice if it is sound and holds no CT slice.
    """
    try:
        with quiet(), file.path.open("rb") as stream:
            return tuple(_frames(stream, file))
    except StudyError:
        raise
    except OSError as error:
        raise UnreadableFile(f"{file.name}: can't be read from disk ({error.strerror or error})") from error
    except ExtentError as error:
        raise UnreadableFile(f"{file.name}: {error}") from error
    # On broken input pydicom raises nearly anything, from KeyError to RecursionError, and its text may quote what the
    # file holds: only the type is shown.
    except Exception as error:
        raise UnreadableFile(f"{file.name}: its DICOM header is broken ({type(error).__name__})") from error


def _frames(stream: BinaryIO, file: FoundFile) -> Iterator[Frame]:
    header = read_header(stream, _TAGS)
    image = Attributes([header.dataset])
    _require_ct(image, file)
    if "LOCALIZER" in image.texts("ImageType"):
        yield _frame(file, 0, image, header.syntax, None)
        return
    _require_grey(image, file)
    refusal = decoder_refusal(header.syntax)
    if refusal:
        raise UnreadableFile(f"{file.name}: {refusal}")
    count = _frame_count(image, file)
    value_representation, spans = _spans(header, image, count)
    for index, frame in enumerate(_frame_attributes(header.dataset, count, file)):
        _require_hounsfield(frame, multi_frame=count > 1, file=file)
        pixels = _stored_pixels(frame, header.syntax, spans[index], value_representation)
        yield _frame(file, index, frame, header.syntax, pixels)


def _require_ct(image: Attributes, file: FoundFile) -> None:
    modality, sop_class = image.text("Modality").upper(), image.text("SOPClassUID")
    if sop_class == MediaStorageDirectoryStorage:
        raise NotACtSlice(f"{file.name}: is a DICOMDIR, the index of a medium")
    if modality == "CT" or (not modality and sop_class in _CT_CLASSES):
        return
    uid = UID(sop_class)
    kind = uid.name if uid.is_valid and uid else "an object without SOP class"
    raise NotACtSlice(f"{file.name}: is no CT image (modality {modality or 'not given'}, {kind})")


def _require_grey(image: Attributes, file: FoundFile) -> None:
    rows, columns = image.integer("Rows"), image.integer("Columns")
    photometric = image.text("PhotometricInterpretation").upper()
    if rows is None and columns is None and not photometric:
        raise NotACtSlice(f"{file.name}: holds no image")
    if not rows or not columns or not 0 < rows * columns <= MAX_PIXELS_PER_SLICE:
        raise UnreadableFile(f"{file.name}: claims {rows} rows and {columns} columns; 1 to 4096 of each are read")
    if photometric not in _GREY or (image.integer("SamplesPerPixel") or 1) != 1:
        raise NotACtSlice(f"{file.name}: is no grey image (photometric interpretation {photometric[:16]!r}), so not HU")
    allocated, stored = image.integer("BitsAllocated"), image.integer("BitsStored")
    high_bit, signed = _high_bit(image), image.integer("PixelRepresentation")
    if allocated not in _BITS_ALLOCATED or not 0 < (stored or 0) <= high_bit + 1 <= allocated or signed not in (0, 1):
        raise UnreadableFile(
            f"{file.name}: its pixels are described as {allocated} bits allocated, {stored} stored, high bit "
            f"{high_bit}, representation {signed}, which no CT image has"
        )


def _require_hounsfield(frame: Attributes, *, multi_frame: bool, file: FoundFile) -> None:
    slope, intercept = frame.number("RescaleSlope"), frame.number("RescaleIntercept")
    if frame.get("ModalityLUTSequence") is not None and slope is None:
        # What a Modality LUT gives is unsigned, so no Hounsfield units; the CT image module asks for a rescale.
        raise NotACtSlice(f"{file.name}: maps its pixels by a Modality LUT, which can't give Hounsfield units")
    if not slope or intercept is None:
        raise NotACtSlice(f"{file.name}: has no rescale slope and intercept: its pixels may be anything")
    # Single-frame files carry "unspecified" where HU is meant; in an Enhanced CT it marks a computed map (perfusion).
    unit = frame.text("RescaleType").upper()
    if unit not in _HU and (multi_frame or unit != _UNSPECIFIED):
        raise NotACtSlice(f"{file.name}: its pixels are rescaled to {unit!r}, not to Hounsfield units")


def _high_bit(image: Attributes) -> int:
    high_bit = image.integer("HighBit")
    return (image.integer("BitsStored") or 0) - 1 if high_bit is None else high_bit


def _frame_count(image: Attributes, file: FoundFile) -> int:
    count = image.integer("NumberOfFrames") or 1
    if not 0 < count <= MAX_FRAMES:
        raise UnreadableFile(f"{file.name}: claims {count} frames; up to {MAX_FRAMES} are read")
    return count


def _spans(header: Header, image: Attributes, count: int) -> tuple[str, tuple[tuple[Span, ...], ...]]:
    """The value representation of the pixel data, and the spans of every frame."""
    element = find_pixel_element(header.stream, header.syntax)
    if header.syntax.is_encapsulated:
        spans = encapsulated_spans(header.stream, element, count, image.get("ExtendedOffsetTable"))
    else:
        rows, columns, bits = (cast(int, image.integer(keyword)) for keyword in ("Rows", "Columns", "BitsAllocated"))
        frame_bytes = rows * columns * bits // 8
        spans = tuple((span,) for span in native_spans(header.stream, element, count, frame_bytes))
    return element.value_representation, spans


def _frame_attributes(dataset: Dataset, count: int, file: FoundFile) -> Iterator[Attributes]:
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    shared = dataset.get("SharedFunctionalGroupsSequence") or ()
    if not per_frame and count == 1:
        yield Attributes([*_group_items(shared), dataset])
        return
    if len(per_frame) != count:
        raise UnreadableFile(f"{file.name}: describes the geometry of {len(per_frame)} frames and holds {count}")
    shared_items = list(_group_items(shared))
    for groups in per_frame:
        yield Attributes([*_group_items([groups]), *shared_items, dataset])


def _group_items(groups: Any) -> Iterator[Dataset]:
    """The items of the functional groups that matter here, flattened."""
    for dataset in groups:
        for keyword in _FRAME_GROUPS:
            yield from dataset.get(keyword) or ()


def _stored_pixels(frame: Attributes, syntax: UID, spans: tuple[Span, ...], value_representation: str) -> StoredPixels:
    bits_allocated = cast(int, frame.integer("BitsAllocated"))
    signed = frame.integer("PixelRepresentation") == 1
    return StoredPixels(
        transfer_syntax_uid=str(syntax),
        deflated=syntax == DeflatedExplicitVRLittleEndian,
        spans=spans,
        value_representation=value_representation,
        photometric=frame.text("PhotometricInterpretation").upper(),
        bits_allocated=bits_allocated,
        bits_stored=cast(int, frame.integer("BitsStored")),
        high_bit=_high_bit(frame),
        signed=signed,
        slope=cast(float, frame.number("RescaleSlope")),
        intercept_hu=cast(float, frame.number("RescaleIntercept")),
        padding=_padding(frame, bits_allocated, signed),
    )


def _padding(frame: Attributes, bits_allocated: int, signed: bool) -> tuple[int, int] | None:
    """The inclusive range of stored values outside the field of view (PS3.3 C.7.5.1.1.2)."""
    value = _as_stored(frame.get("PixelPaddingValue"), bits_allocated, signed)
    if value is None:
        return None
    limit = _as_stored(frame.get("PixelPaddingRangeLimit"), bits_allocated, signed)
    limit = value if limit is None else limit
    return min(value, limit), max(value, limit)


def _as_stored(value: Any, bits: int, signed: bool) -> int | None:
    """A number in the sign of the pixels. Writers confuse the two: a signed -2000 is found as an unsigned 63536."""
    if not isinstance(value, int):
        return None
    wrapped = value % (1 << bits)
    return wrapped - (1 << bits) if signed and wrapped >= 1 << (bits - 1) else wrapped


def _frame(file: FoundFile, index: int, attributes: Attributes, syntax: UID, pixels: StoredPixels | None) -> Frame:
    spacing = attributes.numbers("PixelSpacing", 2)
    directions = attributes.numbers("ImageOrientationPatient", 6)
    position = attributes.numbers("ImagePositionPatient", 3)
    frame = Frame(
        file=file,
        frame=index,
        modality=attributes.text("Modality").upper() or "CT",
        series_uid=attributes.text("SeriesInstanceUID") or None,
        series_number=attributes.integer("SeriesNumber"),
        instance_number=attributes.integer("InstanceNumber"),
        instance_uid=attributes.text("SOPInstanceUID"),
        transfer_syntax=f"{syntax.name} ({syntax})" if syntax.name != syntax else str(syntax),
        rows=attributes.integer("Rows") or 0,
        columns=attributes.integer("Columns") or 0,
        pixel_spacing_mm=cast("tuple[float, float] | None", spacing),
        orientation=None if directions is None else cast("tuple[Vector, Vector]", (directions[:3], directions[3:])),
        position_mm=cast("Vector | None", position),
        table_position_mm=attributes.number("SliceLocation"),
        localizer=pixels is None,
        pixels=pixels,
    )
    slice_normal(frame)  # raises for a broken orientation, here where only this file is refused for it
    return frame
