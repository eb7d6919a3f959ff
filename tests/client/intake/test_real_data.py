"""Intake on real scans and on every file of the robustness corpus."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from ct_files import save

from groundglass.errors import GroundglassError, NotACtSlice, UnreadableFile
from groundglass_client.intake import decode_hu, open_study

SECONDS_PER_FILE = 10


def test_a_patient_opens_head_to_feet(data_root: Path) -> None:
    """P001 is one series of 148 slices in the order of the radiologists' labels, whatever its file names say."""
    labels = json.loads((data_root / "covid_ct_md" / "P001_slice_labels.json").read_text())
    with open_study(data_root / "covid_ct_md" / "P001") as study:
        assert [source.file for source in study.slices] == [label["file"] for label in labels]
        assert [source.position_mm for source in study.slices] == pytest.approx([label["z_mm"] for label in labels])
        assert study.series.spacing_mm == pytest.approx(2.0)
        assert [*study.gaps, *study.duplicates, *study.refused, *study.ignored, *study.other_series] == []
        middle = decode_hu(study.slices[70])
    assert middle.dtype == np.int16
    assert middle.shape == (512, 512)
    assert -1024 == middle.min() < middle.max() < 2106


def test_empty_instance_uids_and_invalid_series_uids_keep_every_slice(data_root: Path, tmp_path: Path) -> None:
    """A scan whose SOP UIDs are empty and whose series UID is a dashed UUID, as found in the wild, stays whole."""
    for path in sorted((data_root / "covid_ct_md" / "P001").iterdir())[:12]:
        with pydicom.config.disable_value_validation():
            image = pydicom.dcmread(path)
            image.SOPInstanceUID = ""
            image.SeriesInstanceUID = "0a1b2c3d-4e5f-6789-abcd-ef0123456789"
            save(image, tmp_path / path.name)
    with open_study(tmp_path) as study:
        assert len(study.slices) == 12
        assert study.series.series_instance_uid == "0a1b2c3d-4e5f-6789-abcd-ef0123456789"


@pytest.mark.parametrize("image", ["CT1", "CT2"])
def test_lossless_syntaxes_decode_to_the_same_units(data_root: Path, image: str) -> None:
    """The NEMA samples give the same HU uncompressed, in RLE, JPEG Lossless, JPEG-LS and JPEG 2000."""
    folder = data_root / "robustness" / "nema"
    plain = _only_slice(folder / f"{image}_UNC")
    for syntax in ("RLE", "JPLL", "JLSL", "J2KR"):
        np.testing.assert_array_equal(_only_slice(folder / f"{image}_{syntax}"), plain, err_msg=syntax)


@pytest.mark.parametrize("image", ["CT1_JLSN", "CT1_J2KI", "CT2_JLSN", "CT2_J2KI"])
def test_lossy_syntaxes_stay_near_the_original(data_root: Path, image: str) -> None:
    """Lossy NEMA samples differ from the uncompressed one by a few HU on average."""
    folder = data_root / "robustness" / "nema"
    difference = _only_slice(folder / image).astype(int) - _only_slice(folder / f"{image[:3]}_UNC")
    assert 0 < np.abs(difference).mean() < 30


def test_one_slice_in_every_transfer_syntax(data_root: Path) -> None:
    """Lossless copies of one slice are identical, lossy ones near, the rest is refused with the name and UID."""
    folder = data_root / "robustness" / "transfer_syntaxes"
    plain = _only_slice(folder / "CTImage.dcm")
    copies = {path.stem.rpartition("_")[2]: path for path in folder.glob("CTImage.dcm_*")}
    assert len(copies) == 15
    for uid, path in copies.items():
        last = uid.rpartition(".")[2]
        if last in ("53", "55"):
            with pytest.raises(UnreadableFile, match=uid):
                _only_slice(path)
        else:
            lossy = last in ("50", "51", "81", "91")
            assert np.abs(_only_slice(path).astype(int) - plain).mean() <= (20 if lossy else 0), path.name


def test_padding_becomes_air(data_root: Path) -> None:
    """Pixels outside a GE scanner's field of view (raw -2000, padding -32768) are air, like the lowest unit."""
    hu = _only_slice(data_root / "robustness" / "transfer_syntaxes" / "CTImage.dcm")
    assert hu[0, 0] == hu.min() == -1024


def test_a_tilted_uneven_scan_is_sorted_along_its_normal(data_root: Path) -> None:
    """The tilted head scan has falling positions, its gantry tilt of 18.5 degrees, and its holes reported."""
    with open_study(data_root / "robustness" / "tilted_nonuniform") as study:
        positions = [source.position_mm for source in study.slices]
        distances = -np.diff(np.array(positions, dtype=float))
        assert len(study.slices) == 28
        assert (distances > 0).all()
        assert study.series.tilt_degrees == pytest.approx(18.5, abs=0.1)
        assert study.series.spacing_range_mm == pytest.approx((distances.min(), distances.max()))
        wide = np.flatnonzero(distances > 1.5 * np.median(distances))
        assert [gap.after_index for gap in study.gaps] == wide.tolist() != []


@pytest.mark.parametrize("name", ["0000.dcm", "PatientA.dcm", "ex-covid-ct.dcm"])
def test_other_images_are_no_ct_slices(data_root: Path, name: str) -> None:
    """CR and RGB files are refused by name, with what they are."""
    with (
        pytest.raises(NotACtSlice, match=rf"{name}: is no CT image \(modality"),
        open_study(data_root / "robustness" / "not_ct" / name),
    ):
        pass


def test_a_wrong_transfer_syntax_is_named(data_root: Path) -> None:
    """A file that claims JPEG-LS and holds plain pixels is refused for just that."""
    path = data_root / "robustness" / "oddities" / "20-wrong-transfer-syntax.dcm"
    with pytest.raises(UnreadableFile, match="not encapsulated"), open_study(path):
        pass


@pytest.mark.timeout(120)
def test_every_file_of_the_corpus_is_analysed_or_refused_by_name(data_root: Path) -> None:
    """Whatever is wrong with a file, opening and decoding it ends in HU or in our error with its name and a reason."""
    files = sorted(path for path in (data_root / "robustness").rglob("*") if path.is_file())
    analysed = {path.name for path in files if _analysed_or_refused(path)}
    assert len(files) == 464
    assert len(analysed) > 60


def _analysed_or_refused(path: Path) -> bool:
    try:
        hu = _only_slice(path)
    except GroundglassError as error:
        name, _, reason = str(error).partition(": ")
        assert name == path.name
        assert len(reason) > 10
        assert "FUZZ^CASE" not in reason
        return False
    assert hu.dtype == np.int16
    return True


def _only_slice(path: Path) -> np.ndarray:
    with open_study(path) as study:
        (source,) = study.slices
        return decode_hu(source)
