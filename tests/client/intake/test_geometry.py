"""Which slices make a study, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest
from ct_files import ct_slice, enhanced_ct, save
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import SecondaryCaptureImageStorage

from groundglass.errors import GeometryError, NoSeries, NotACtSlice, UnreadableFile
from groundglass.study import Study
from groundglass_client.intake import decode_hu, open_study


def opened(path: Path, **options: object) -> Study:
    """A study whose files stay, so that it can be looked at after it was closed."""
    with open_study(path, **options) as study:  # type: ignore[arg-type]
        return study


def positions(study: Study) -> list[float | None]:
    """The slices' positions in mm."""
    return [source.position_mm for source in study.slices]


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)))
def test_file_names_do_not_matter(tmp_path_factory: pytest.TempPathFactory, names: list[int]) -> None:
    """Slices run head to feet however their files are called."""
    folder = tmp_path_factory.mktemp("named")
    for place, name in enumerate(names):
        save(ct_slice(z_mm=2.5 * place), folder / f"{name}.dcm")
    study = opened(folder)
    assert positions(study) == [12.5, 10.0, 7.5, 5.0, 2.5, 0.0]
    assert [source.index for source in study.slices] == list(range(6))


def test_an_upside_down_series_still_starts_at_the_head(tmp_path: Path) -> None:
    """Where the cross product of the image's directions points to the feet, the normal is turned around."""
    for z_mm in (0, 2, 4):
        save(ct_slice(z_mm, ImageOrientationPatient=[1, 0, 0, 0, -1, 0]), tmp_path / f"{z_mm}.dcm")
    assert positions(opened(tmp_path)) == [4.0, 2.0, 0.0]


def test_a_missing_slice_is_a_gap(tmp_path: Path) -> None:
    """A hole in the volume is reported with its place and width."""
    for z_mm in (10, 8, 6, 2, 0):
        save(ct_slice(z_mm), tmp_path / f"{z_mm}.dcm")
    (gap,) = opened(tmp_path).gaps
    assert (gap.after_index, gap.from_mm, gap.to_mm, gap.distance_mm) == (2, 6.0, 2.0, 4.0)


def test_a_double_is_left_out_and_named(tmp_path: Path) -> None:
    """Of two slices at one position that of the lower instance number stays, the other is reported."""
    for z_mm in (4, 2, 0):
        save(ct_slice(z_mm, InstanceNumber=1), tmp_path / f"{z_mm}.dcm")
    save(ct_slice(2, InstanceNumber=9), tmp_path / "0-again.dcm")
    study = opened(tmp_path)
    assert [source.file for source in study.slices] == ["4.dcm", "2.dcm", "0.dcm"]
    assert [(double.file, double.reason) for double in study.duplicates] == [
        ("0-again.dcm", "lies at 2.00 mm, as 2.dcm does")
    ]
    assert not study.partial


def test_a_single_slice_is_a_study(tmp_path: Path) -> None:
    """One file makes a study of one slice, without spacing."""
    study = opened(save(ct_slice(7.0), tmp_path / "one.dcm"))
    assert positions(study) == [7.0]
    assert study.series.spacing_mm is None


def test_a_slice_of_another_size_is_refused_or_counted(tmp_path: Path) -> None:
    """Mixed geometry names the odd file; with skip_bad it is counted and the majority is kept."""
    for z_mm in (4, 2):
        save(ct_slice(z_mm), tmp_path / f"{z_mm}.dcm")
    odd = ct_slice(0, PixelSpacing=[0.9, 0.9])
    save(odd, tmp_path / "odd.dcm")
    with pytest.raises(GeometryError, match=r"odd\.dcm: has pixels of \(0\.9, 0\.9\) mm"):
        opened(tmp_path)
    study = opened(tmp_path, skip_bad=True)
    assert [refusal.file for refusal in study.refused] == ["odd.dcm"]
    assert len(study.slices) == 2
    assert study.partial


def test_the_axial_series_with_most_slices_is_chosen(tmp_path: Path) -> None:
    """A longer coronal series, a shorter axial one and a localizer are named as others, not mixed in."""
    for z_mm in range(3):
        save(ct_slice(z_mm), tmp_path / f"axial{z_mm}.dcm")
    save(ct_slice(0, SeriesInstanceUID="1.2.3.5", SeriesNumber=3), tmp_path / "thin.dcm")
    for y_mm in range(5):
        coronal = ct_slice(0, SeriesInstanceUID="1.2.3.6", SeriesNumber=4, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
        coronal.ImagePositionPatient = [0, y_mm, 0]
        save(coronal, tmp_path / f"coronal{y_mm}.dcm")
    save(ct_slice(0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), tmp_path / "scout.dcm")
    study = opened(tmp_path)
    assert (study.series.series_number, study.series.slice_count) == (2, 3)
    assert sorted((other.series_number, other.slice_count) for other in study.other_series) == [(2, 1), (3, 1), (4, 5)]
    assert opened(tmp_path, series="3").series.series_instance_uid == "1.2.3.5"
    assert opened(tmp_path, series="1.2.3.5").series.series_number == 3
    with pytest.raises(NoSeries, match="no axial series"):
        opened(tmp_path, series="4")
    with pytest.raises(NoSeries, match="holds no CT series 77; it holds series number 2"):
        opened(tmp_path, series="77")


def test_slices_without_position_follow_their_slice_location_or_number(tmp_path: Path) -> None:
    """Where files lack the position, the slice location orders them; where they lack that too, the instance number."""
    for number, location in enumerate((30.0, 20.0, 10.0), start=1):
        plain = ct_slice(InstanceNumber=4 - number, SliceLocation=location)
        del plain.ImagePositionPatient
        save(plain, tmp_path / "located" / f"{number}.dcm")
        del plain.SliceLocation
        save(plain, tmp_path / "numbered" / f"{number}.dcm")
        del plain.InstanceNumber
        save(plain, tmp_path / "neither" / f"{number}.dcm")
    assert positions(opened(tmp_path / "located")) == [30.0, 20.0, 10.0]
    numbered = opened(tmp_path / "numbered")
    assert [source.file for source in numbered.slices] == ["3.dcm", "2.dcm", "1.dcm"]
    assert positions(numbered) == [None] * 3
    with pytest.raises(GeometryError, match="neither position, slice location nor instance number"):
        opened(tmp_path / "neither")


def test_an_enhanced_ct_opens_frame_by_frame(tmp_path: Path) -> None:
    """Frames of a multi-frame file are sorted by their own positions and rescaled by their own intercepts."""
    path = save(enhanced_ct([0, 5, 10], [-1000, -900, -800]), tmp_path / "enhanced.dcm")
    study = opened(path)
    assert [(source.frame, source.position_mm) for source in study.slices] == [(2, 10.0), (1, 5.0), (0, 0.0)]
    assert [int(decode_hu(source)[0, 0]) for source in study.slices] == [-798, -899, -1000]


def test_an_empty_folder_holds_no_series(tmp_path: Path) -> None:
    """A folder without files says so, and a path that does not exist too."""
    with pytest.raises(NoSeries, match="holds no file"):
        opened(tmp_path)
    with pytest.raises(UnreadableFile, match="does not exist"):
        opened(tmp_path / "nowhere")


def test_what_is_no_ct_image_is_ignored_in_a_folder(tmp_path: Path) -> None:
    """Text files, other modalities and resource forks beside a scan are listed with a reason, and do no harm."""
    save(ct_slice(), tmp_path / "slice.dcm")
    save(ct_slice(Modality="SR", SOPClassUID=SecondaryCaptureImageStorage), tmp_path / "report.dcm")
    (tmp_path / "notes.txt").write_text("read me")
    (tmp_path / "._slice.dcm").write_bytes(b"\x00\x05\x16\x07")
    study = opened(tmp_path)
    assert [refusal.file for refusal in study.ignored] == ["._slice.dcm", "notes.txt", "report.dcm"]
    assert not study.partial
    with pytest.raises(NotACtSlice, match=r"report\.dcm"):
        opened(tmp_path / "report.dcm")


@pytest.mark.parametrize("damage", ["truncated", "empty", "no DICOM"])
def test_a_broken_file_is_raised_or_counted(tmp_path: Path, damage: str) -> None:
    """A file that should be a slice and is broken stops the study, or is counted with skip_bad."""
    whole = save(ct_slice(), tmp_path / "whole.dcm").read_bytes()
    content = {"truncated": whole[:-100], "empty": b"", "no DICOM": b"some text"}[damage]
    (tmp_path / "broken.dcm").write_bytes(content)
    with pytest.raises(UnreadableFile, match=r"broken\.dcm: .*"):
        opened(tmp_path)
    study = opened(tmp_path, skip_bad=True)
    assert [refusal.file for refusal in study.refused] == ["broken.dcm"]
    assert study.partial


def test_no_message_holds_the_patients_name(tmp_path: Path) -> None:
    """Neither the study nor an error about one of its files quotes the patient's name or ID."""
    save(ct_slice(), tmp_path / "slice.dcm")
    save(ct_slice(2, RescaleSlope=None), tmp_path / "raw.dcm")
    save(ct_slice(4, ImageOrientationPatient=[0, 0, 0, 0, 0, 0]), tmp_path / "bad.dcm")
    with pytest.raises(GeometryError) as raised:
        opened(tmp_path)
    assert "SECRET" not in (str(raised.value) + repr(opened(tmp_path, skip_bad=True))).upper()
