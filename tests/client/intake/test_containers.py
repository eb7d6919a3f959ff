"""The forms that a study comes in: zip files, DICOMDIRs, folders of pictures."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ct_files import ct_slice, save
from PIL import Image
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage

from groundglass.contract import LUNG_WINDOW_CENTRE_HU, LUNG_WINDOW_WIDTH_HU
from groundglass.errors import GeometryError, UnreadableFile
from groundglass_client.intake import decode_hu, files, open_study


def make_zip(folder: Path, target: Path) -> Path:
    """A zip file of everything below a folder."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*.dcm")):
            archive.write(path, path.relative_to(folder).as_posix())
    return target


def dicomdir(names: list[list[str]]) -> Dataset:
    """A DICOMDIR that lists those files, each a list of the parts of its path."""
    index = Dataset()
    index.file_meta = FileMetaDataset()
    index.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    index.SOPClassUID = MediaStorageDirectoryStorage
    index.DirectoryRecordSequence = [Dataset() for _ in names]
    for record, name in zip(index.DirectoryRecordSequence, names, strict=True):
        record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", name
    return index


def test_a_dicomdir_may_not_lead_outside(tmp_path: Path) -> None:
    """A DICOMDIR that lists a file above its folder is refused."""
    with config.disable_value_validation():
        save(dicomdir([["..", "secret"]]), tmp_path / "DICOMDIR")
    with pytest.raises(UnreadableFile, match="lists a file outside"), open_study(tmp_path):
        pass


def test_a_zip_file_opens_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zipped study decodes while it is open; the unpacked files are gone afterwards."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    save(ct_slice(2), tmp_path / "in" / "deep" / "a.dcm")
    save(ct_slice(0), tmp_path / "in" / "b.dcm")
    with open_study(make_zip(tmp_path / "in", tmp_path / "study.zip")) as study:
        assert [source.file for source in study.slices] == ["deep/a.dcm", "b.dcm"]
        assert decode_hu(study.slices[0])[0, 0] == -1000
        assert list(scratch.iterdir())
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("name", ["../escape.dcm", "/escape.dcm", "a/../../escape.dcm", "C:/escape.dcm"])
def test_a_zip_file_may_not_lead_outside(tmp_path: Path, name: str) -> None:
    """A zip file with a name that leaves its folder is refused, and nothing is written."""
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(UnreadableFile, match="leads outside"), open_study(tmp_path / "evil.zip"):
        pass
    assert not list(tmp_path.rglob("escape.dcm"))


def test_a_zip_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip file that unpacks to more than the limit is refused."""
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(5000))
    with pytest.raises(UnreadableFile, match="unpacks to more than 1000 bytes"), open_study(tmp_path / "bomb.zip"):
        pass


def test_a_damaged_zip_file_is_refused_by_name(tmp_path: Path) -> None:
    """A zip file whose content does not match its checksum is refused."""
    save(ct_slice(), tmp_path / "in" / "a.dcm")
    archive = make_zip(tmp_path / "in", tmp_path / "bad.zip")
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(UnreadableFile, match=r"bad\.zip: can't be unpacked"), open_study(archive):
        pass


def test_a_dicomdir_opens_what_it_lists(tmp_path: Path) -> None:
    """A DICOMDIR and the folder that holds it open the same slices; a listed file that is gone is refused by name."""
    for z_mm in range(3):
        save(ct_slice(z_mm), tmp_path / "medium" / "IMAGES" / f"I{z_mm}")
    save(dicomdir([["IMAGES", f"I{z_mm}"] for z_mm in range(3)]), tmp_path / "medium" / "DICOMDIR")
    with open_study(tmp_path / "medium" / "DICOMDIR") as listed, open_study(tmp_path / "medium") as folder:
        assert [source.position_mm for source in listed.slices] == [2.0, 1.0, 0.0]
        assert [source.file for source in listed.slices] == [source.file for source in folder.slices]
        assert [refusal.file for refusal in folder.ignored] == ["DICOMDIR"]
        gone = listed.slices[1]
    gone.path.unlink()
    with pytest.raises(UnreadableFile, match=f"{gone.file}: can't be read"), open_study(tmp_path / "medium"):
        pass


def test_a_pipe_in_a_folder_does_not_block(tmp_path: Path) -> None:
    """A named pipe, which would make a reader wait for ever, is ignored."""
    save(ct_slice(), tmp_path / "slice.dcm")
    os.mkfifo(tmp_path / "pipe.dcm")
    with open_study(tmp_path) as study:
        assert [(refusal.file, refusal.reason) for refusal in study.ignored] == [("pipe.dcm", "is no regular file")]


def test_pictures_come_in_natural_order_and_window_back(tmp_path: Path) -> None:
    """slice2 comes before slice10, and the lung window gives every grey of a picture back."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name in ("slice10.png", "slice2.png"):
        Image.fromarray(ramp).save(tmp_path / name)
    with open_study(tmp_path) as study:
        assert [source.file for source in study.slices] == ["slice2.png", "slice10.png"]
        assert [source.position_mm for source in study.slices] == [None, None]
        hu = decode_hu(study.slices[0])
    windowed = (hu - LUNG_WINDOW_CENTRE_HU) / LUNG_WINDOW_WIDTH_HU + 0.5
    np.testing.assert_array_equal(np.rint(windowed * 255), ramp)


def test_real_pictures_open(data_root: Path) -> None:
    """A folder of real 8-bit slices opens whole; one of mixed sizes names the first that does not fit."""
    with open_study(data_root / "lesion_slices" / "ct") as study:
        assert (len(study.slices), study.series.rows, study.series.columns) == (541, 256, 256)
        assert decode_hu(study.slices[0]).shape == (256, 256)
    with (
        pytest.raises(GeometryError, match="pixels, the series"),
        open_study(data_root / "covid_ct_images" / "CT_COVID"),
    ):
        pass


def test_a_deep_or_damaged_picture_is_refused(tmp_path: Path) -> None:
    """A 16-bit PNG is no window of 8 bits, and a cut one is unreadable: both by name."""
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UnreadableFile, match=r"deep\.png: has more than 8 bits"), open_study(tmp_path / "deep.png"):
        pass
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1500])
    with pytest.raises(UnreadableFile, match=r"cut\.png"), open_study(tmp_path / "cut.png") as study:
        decode_hu(study.slices[0])
