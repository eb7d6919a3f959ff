"""Stored values become Hounsfield units, whatever their form."""

from __future__ import annotations

import pickle
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from ct_files import SIDE, ct_slice, save, set_values
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEG2000Lossless, JPEGLossless, JPEGLSLossless, RLELossless

from groundglass.errors import GroundglassError, NotACtSlice, UnreadableFile
from groundglass_client.intake import decode_hu, open_study
from groundglass_client.intake.extents import ExtentError, PixelElement, encapsulated_spans
from groundglass_client.intake.hounsfield import rescale
from groundglass_client.phantom import PhantomSettings, write_phantom

SEQUENCE_END = b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"


def first_hu(image: Dataset, tmp_path: Path) -> int:
    """The Hounsfield units of the first pixel of an image that was written and opened."""
    with open_study(save(image, tmp_path / "image.dcm")) as study:
        return int(decode_hu(study.slices[0])[0, 0])


def holding(value: int, dtype: type[np.generic] = np.uint16, **changes: object) -> Dataset:
    """A slice whose pixels all hold ``value``."""
    image = ct_slice(**changes)
    set_values(image, np.full((SIDE, SIDE), value, dtype=dtype))
    return image


@given(st.integers(0, 4095), st.floats(0.1, 4), st.integers(-2000, 0))
def test_the_rescale_is_linear_rounded_and_clipped(value: int, slope: float, intercept: int) -> None:
    """Any slope and intercept give the rounded line, not below air and not beyond int16."""
    hu = rescale(np.array([[value]], dtype=np.uint16), slope, intercept, None)
    assert hu.dtype == np.int16
    assert int(hu[0, 0]) == max(-1024, round(value * slope + intercept))


def padding_ranges() -> st.SearchStrategy[tuple[int, int] | None]:
    """Ranges of stored values, and none."""
    limits = st.tuples(st.integers(-70000, 70000), st.integers(-70000, 70000))
    return st.none() | limits.map(lambda pair: (min(pair), max(pair)))


@given(
    st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4"]),
    st.sampled_from([1.0, -1.0, 0.5]),
    st.integers(-40000, 40000) | st.sampled_from([-32768, -1024.5, 0, 32767, 32768, 1e12]),
    padding_ranges(),
    st.data(),
)
def test_the_quick_rescale_equals_the_plain_one(
    dtype: str, slope: float, intercept: float, padding: tuple[int, int] | None, data: st.DataObject
) -> None:
    """In any type, with any intercept and padding, each value becomes what exact arithmetic says; the input stays."""
    held = np.iinfo(dtype)
    values = data.draw(st.lists(st.integers(int(held.min), int(held.max)), min_size=1, max_size=9))
    stored = np.array([values, values], dtype)
    hu = rescale(stored, slope, intercept, padding)
    plain = [
        -1024
        if padding is not None and padding[0] <= value <= padding[1]
        else int(min(32767, max(-1024, round(value * slope + intercept))))
        for value in values
    ]
    assert hu.dtype == np.int16
    assert hu.tolist() == [plain, plain]
    assert stored.tolist() == [values, values]


def test_values_beyond_int16_are_clipped() -> None:
    """Metal and broken rescales saturate instead of wrapping around."""
    hu = rescale(np.array([[0, 60000]], dtype=np.uint16), 2.0, -40000.0, None)
    assert hu.tolist() == [[-1024, 32767]]


def test_high_bits_that_carry_no_value_are_ignored(tmp_path: Path) -> None:
    """Overlay bits above the stored ones do not change the units, and the sign is that of the stored bits."""
    assert first_hu(holding(0xF000 | 1000), tmp_path) == -24
    signed = holding(0xFF0, PixelRepresentation=1, RescaleIntercept=0)
    assert first_hu(signed, tmp_path) == -16


def test_values_in_the_upper_bits_are_shifted_down(tmp_path: Path) -> None:
    """Twelve bits stored with high bit 15 lie four bits up."""
    assert first_hu(holding(1000 << 4, HighBit=15), tmp_path) == -24


def test_padding_pixels_are_air(tmp_path: Path) -> None:
    """Pixels of the padding value or within its range become air, even if the value is written with the wrong sign."""
    padded = {"BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1, "RescaleIntercept": 0}
    assert first_hu(holding(500, np.int16, PixelPaddingValue=500, **padded), tmp_path) == -1024
    in_range = holding(500, np.int16, PixelPaddingValue=400, PixelPaddingRangeLimit=600, **padded)
    assert first_hu(in_range, tmp_path) == -1024
    assert first_hu(holding(500, np.int16, PixelPaddingValue=400, **padded), tmp_path) == 500


def test_monochrome1_changes_the_display_and_not_the_units(tmp_path: Path) -> None:
    """The photometric interpretation comes after the rescale, so an inverted display has the same HU."""
    assert first_hu(holding(1000, PhotometricInterpretation="MONOCHROME1"), tmp_path) == -24


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"RescaleSlope": None}, "no rescale slope"),
        ({"RescaleSlope": 0}, "no rescale slope"),
        ({"RescaleType": "OD"}, "rescaled to 'OD'"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "is no grey image"),
        ({"Modality": "MR"}, "modality MR"),
    ],
)
def test_pixels_that_are_not_hounsfield_units_are_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    """What is not known to be HU is no CT slice: a wrong scale would give a wrong verdict."""
    with pytest.raises(NotACtSlice, match=reason):
        first_hu(ct_slice(**changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Rows": 65535, "Columns": 65535}, "claims 65535 rows"),
        ({"Rows": 64}, "truncated"),
        ({"NumberOfFrames": 999999}, "claims 999999 frames"),
        ({"BitsAllocated": 12}, "12 bits allocated"),
    ],
)
def test_a_header_that_promises_too_much_is_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    """Sizes that the file can't hold are refused from the header, before any memory is taken."""
    with pytest.raises(UnreadableFile, match=reason):
        first_hu(ct_slice(**changes), tmp_path)


@pytest.mark.parametrize("syntax", ["rle", "jpeg-lossless", "jpeg-ls", "jpeg2000"])
def test_damaged_codestreams_never_crash(tmp_path: Path, syntax: str) -> None:
    """A compressed slice with flipped bytes or a cut tail decodes to its shape, or is refused by name."""
    rng = np.random.default_rng(7)
    (good,) = write_phantom(PhantomSettings(slices=1, rows=64, columns=64, syntax=syntax), tmp_path / "good").iterdir()
    content = good.read_bytes()
    start = content.index(b"\xe0\x7f\x10\x00")
    refusals = [_refusal(_damaged(content, start, rng), tmp_path / "bad.dcm") for _ in range(400)]
    assert all(refusal is None or refusal.startswith("bad.dcm: ") for refusal in refusals)
    assert any(refusals)


def _damaged(content: bytes, start: int, rng: np.random.Generator) -> bytes:
    damaged = bytearray(content)
    end = len(content) if rng.random() < 0.5 else start + 160  # the codestream's headers lie there
    for place in rng.integers(start, end, rng.integers(1, 5)):
        damaged[place] = rng.integers(0, 256)
    return bytes(damaged[: rng.integers(start + 20, len(content))]) if rng.random() < 0.3 else bytes(damaged)


def _refusal(content: bytes, path: Path) -> str | None:
    path.write_bytes(content)
    try:
        with open_study(path) as study:
            hu = decode_hu(study.slices[0])
    except GroundglassError as error:
        return str(error)
    assert hu.shape == (study.series.rows, study.series.columns)
    return None


def compressed(encoded: bytes, syntax: UID, **changes: object) -> Dataset:
    """A slice that holds those bytes as its one compressed frame."""
    image = ct_slice(**{"BitsStored": 16, "HighBit": 15, "RescaleIntercept": 0, **changes})
    image.file_meta.TransferSyntaxUID = syntax
    image.PixelData = encapsulate([encoded])
    image["PixelData"].VR, image["PixelData"].is_undefined_length = "OB", True
    return image


def rle(planes: list[bytes], count: int | None = None) -> bytes:
    """An RLE slice of those segments (PS3.5 annex G)."""
    starts = np.cumsum([64, *map(len, planes)])[:-1].tolist()
    return struct.pack("<16L", count or len(planes), *starts, *[0] * (15 - len(starts))) + b"".join(planes)


PLANE = bytes([0x81, 0x07]) * 2  # twice 128 times the byte 7: the pixels of a slice


@pytest.mark.parametrize("padding", [b"", b"\0", b"\0\0", b"\x80\x80", b"\xff\x09"])
def test_padding_behind_an_rle_segment_is_left(tmp_path: Path, padding: bytes) -> None:
    """Writers fill segments up: what comes behind the last pixel is nothing."""
    assert first_hu(compressed(rle([PLANE + padding, PLANE + padding]), RLELossless), tmp_path) == 0x0707


@pytest.mark.parametrize(
    "encoded",
    [
        rle([PLANE]),
        rle([PLANE, PLANE], count=3),
        rle([PLANE, PLANE[:2]]),
        rle([b"", PLANE]),
        rle([PLANE, PLANE])[:63],
        struct.pack("<16L", 2, 64, 1 << 31, *[0] * 13) + PLANE,
        struct.pack("<16L", 2, 64, 60, *[0] * 13) + PLANE,
    ],
    ids=["one-plane", "count", "short-plane", "empty-plane", "short-header", "outside", "before"],
)
def test_a_damaged_rle_slice_is_refused(tmp_path: Path, encoded: bytes) -> None:
    """Segments that are missing, short, or outside of the data are refused before they are read."""
    with pytest.raises(UnreadableFile, match=r"image\.dcm: its pixels can't be decoded"):
        first_hu(compressed(encoded, RLELossless), tmp_path)


@pytest.mark.parametrize("length", [0, 1, 20, 1 << 31])
def test_a_box_around_a_jpeg_2000_codestream_does_not_matter(tmp_path: Path, length: int) -> None:
    """Some files wrap the codestream, which DICOM forbids: the box is not looked at, so a broken one can't hang us."""
    codestream = imagecodecs.jpeg2k_encode(np.full((SIDE, SIDE), 77, np.uint16), level=0, codecformat="J2K")
    box = b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">L", length) + b"ftypjp2 \0\0\0\0jp2 "
    assert first_hu(compressed(box + codestream, JPEG2000Lossless), tmp_path) == 77


SIGNED = np.random.default_rng(3).integers(-(1 << 15), 1 << 15, (SIDE, SIDE)).astype(np.int16)


@pytest.mark.parametrize("predictor", range(1, 8))
def test_every_predictor_of_lossless_jpeg_gives_the_values_back(tmp_path: Path, predictor: int) -> None:
    """Noise over all 16 bits, signed, comes back whatever the predictor (T.81 table H.1)."""
    encoded = imagecodecs.jpeg8_encode(SIGNED.view(np.uint16), lossless=True, predictor=predictor, bitspersample=16)
    image = compressed(encoded, JPEGLossless, PixelRepresentation=1)
    with open_study(save(image, tmp_path / "image.dcm")) as study:
        np.testing.assert_array_equal(decode_hu(study.slices[0]), SIGNED.clip(-1024))


@pytest.mark.parametrize(
    ("syntax", "encoded"),
    [
        (JPEGLSLossless, imagecodecs.jpegls_encode(SIGNED.view(np.uint16))),
        (JPEG2000Lossless, imagecodecs.jpeg2k_encode(SIGNED, level=0, codecformat="J2K")),
        (JPEG2000Lossless, imagecodecs.jpeg2k_encode(SIGNED.view(np.uint16), level=0, codecformat="J2K")),
    ],
    ids=["jpeg-ls", "jpeg2000", "jpeg2000-unsigned"],
)
def test_the_header_says_whether_a_codestream_is_signed(tmp_path: Path, syntax: UID, encoded: bytes) -> None:
    """JPEG-LS knows no sign and JPEG 2000 files have the wrong one: the header's holds."""
    image = compressed(encoded, syntax, PixelRepresentation=1)
    with open_study(save(image, tmp_path / "image.dcm")) as study:
        np.testing.assert_array_equal(decode_hu(study.slices[0]), SIGNED.clip(-1024))


@pytest.mark.parametrize("comment_bytes", [0, 65000, 65100, 65200, 65300, 65400, 200_000])
def test_a_long_header_is_read_to_its_end(tmp_path: Path, comment_bytes: int) -> None:
    """Headers of any length, around the size that is parsed in memory too, give the same slice."""
    image = ct_slice(ImageComments="x" * comment_bytes if comment_bytes <= 10240 else None)
    image.add_new(0x00091001, "OB", bytes(comment_bytes))
    image.add_new(0x00090010, "LO", "GROUNDGLASS")
    assert first_hu(image, tmp_path) == -1000


def test_fragments_are_found_without_an_offset_table(tmp_path: Path) -> None:
    """Frames of several fragments are told apart by their end markers; with a table, by the table."""
    frames = [b"\x01" * 30 + b"\xff\xd9", b"\x02" * 30 + b"\xff\xd9"]
    for has_table in (False, True):
        path = tmp_path / "fragments"
        path.write_bytes(encapsulate(frames, fragments_per_frame=2, has_bot=has_table) + SEQUENCE_END)
        with path.open("rb") as stream:
            spans = encapsulated_spans(stream, PixelElement(0, None, "OB"), 2, None)
        content = path.read_bytes()
        read = [b"".join(content[at : at + length] for at, length in frame) for frame in spans]
        assert read == frames


def test_missing_fragments_are_noticed(tmp_path: Path) -> None:
    """Compressed data that ends early, or holds fewer frames than promised, is no set of frames."""
    path = tmp_path / "fragments"
    whole = encapsulate([b"\x01" * 30], has_bot=False)
    for content, frames in ((whole[:-12], 1), (whole + SEQUENCE_END, 3)):
        path.write_bytes(content)
        with path.open("rb") as stream, pytest.raises(ExtentError):
            encapsulated_spans(stream, PixelElement(0, None, "OB"), frames, None)


def test_slices_decode_in_threads_and_travel_to_processes(data_root: Path) -> None:
    """Eight threads decode what one decodes, the process' warning filters stay as they were, and sources pickle."""
    filters = list(warnings.filters)
    with open_study(data_root / "covid_ct_md" / "P001") as study, ThreadPoolExecutor(8) as pool:
        sources = [pickle.loads(pickle.dumps(source)) for source in study.slices[:32]]  # noqa: S301 - our own pickle
        alone = [decode_hu(source) for source in sources[:8]]
        together = list(pool.map(decode_hu, sources))
    for one, other in zip(alone, together, strict=False):
        np.testing.assert_array_equal(one, other)
    assert list(warnings.filters) == filters
