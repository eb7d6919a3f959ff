"""Stored values become Hounsfield units, whatever their form."""

from __future__ import annotations

import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ct_files import SIDE, ct_slice, save, set_values
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

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
