"""The phantom: what is written is what was made, and it is a study like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from groundglass.errors import SettingError
from groundglass_client.intake import decode_hu, open_study
from groundglass_client.phantom import SYNTAXES, PhantomSettings, parse_lesion, write_phantom
from groundglass_client.phantom.chest import Chest


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_written_phantom_reads_back_exactly(tmp_path: Path, syntax: str) -> None:
    """In every syntax the study opens in order, evenly spaced, and decodes to the generator's units."""
    settings = PhantomSettings(slices=4, rows=128, columns=160, lesion=(1, 3), syntax=syntax, spacing_mm=2.5)
    seen: list[int] = []
    with open_study(write_phantom(settings, tmp_path / "phantom", seen.append)) as study:
        chest = Chest(settings)
        for source in study.slices:
            np.testing.assert_array_equal(decode_hu(source), chest.hu(source.index))
        assert [source.position_mm for source in study.slices] == pytest.approx([0, -2.5, -5, -7.5])
        assert study.series.transfer_syntax is not None
        assert SYNTAXES[syntax] in study.series.transfer_syntax
        assert [*study.gaps, *study.duplicates, *study.refused, *study.ignored] == []
    assert seen == [1, 2, 3, 4]


def test_file_names_do_not_follow_the_anatomy(tmp_path: Path) -> None:
    """Sorted by name, the files are not in the order of the slices."""
    folder = write_phantom(PhantomSettings(slices=12, rows=64, columns=64), tmp_path / "phantom")
    with open_study(folder) as study:
        names = [source.file for source in study.slices]
    assert len(names) == 12
    assert names not in (sorted(names), sorted(names, reverse=True))


def test_the_lesion_is_where_it_was_asked_for() -> None:
    """Ground glass lies in every slice of the range and in no other, and raises the lung to -700 to -450 HU."""
    healthy = Chest(PhantomSettings(slices=30, rows=256, columns=256, noise_hu=0))
    ill = Chest(PhantomSettings(slices=30, rows=256, columns=256, noise_hu=0, lesion=(12, 18)))
    for index in range(30):
        mask = ill.lesion(index)
        same = np.array_equal(ill.hu(index), healthy.hu(index))
        assert mask.any() == (not same) == (12 <= index < 18), index
        if mask.any():
            assert -700 < np.median(ill.hu(index)[mask]) < -450
            assert -900 < np.median(healthy.hu(index)[mask]) < -780


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    """Two phantoms of one seed are the same file by file; another seed differs."""
    settings = PhantomSettings(slices=2, rows=64, columns=64, seed=3)
    first, second = (write_phantom(settings, tmp_path / name) for name in ("first", "second"))
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (second / path.name).read_bytes()
    other = Chest(PhantomSettings(slices=2, rows=64, columns=64, seed=4)).hu(0)
    assert not np.array_equal(Chest(settings).hu(0), other)


def test_neighbours_are_alike() -> None:
    """The anatomy moves smoothly: without noise, neighbouring slices differ far less than distant ones."""
    chest = Chest(PhantomSettings(slices=150, rows=128, columns=128, noise_hu=0))
    here, next_, far = (chest.hu(index).astype(int) for index in (70, 71, 120))
    assert np.abs(here - next_).mean() < 0.3 * np.abs(here - far).mean()


def test_the_files_are_valid_ct_images(tmp_path: Path) -> None:
    """UIDs are valid and unlike each other, and the geometry of a slice is complete."""
    folder = write_phantom(PhantomSettings(slices=3, rows=64, columns=64), tmp_path / "phantom")
    images = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    assert len({image.SOPInstanceUID for image in images}) == 3
    for image in images:
        assert image.SOPInstanceUID.is_valid
        assert image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
        assert image.SeriesInstanceUID == images[0].SeriesInstanceUID
        assert image.ImagePositionPatient[:2] == images[0].ImagePositionPatient[:2]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    """An empty folder is used, one that holds files is refused untouched, and a failure leaves nothing behind."""
    settings = PhantomSettings(slices=1, rows=64, columns=64)
    (tmp_path / "empty").mkdir()
    assert len(list(write_phantom(settings, tmp_path / "empty").iterdir())) == 1
    with pytest.raises(SettingError, match="not empty"):
        write_phantom(settings, tmp_path / "empty")

    def stop(slices: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantom(settings, tmp_path / "stopped", stop)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slices": 0}, "0 slices"),
        ({"slices": 10, "lesion": (5, 11)}, "lesion 5:11 lies outside"),
        ({"slices": 10, "lesion": (5, 5)}, "lesion 5:5 lies outside"),
        ({"syntax": "jpeg"}, "unknown syntax 'jpeg'; known are explicit"),
        ({"rows": 8}, "8 x 512 pixels"),
        ({"spacing_mm": 0.0}, "spacing 0.0 mm"),
        ({"noise_hu": -1.0}, "noise of -1.0"),
    ],
)
def test_settings_that_make_no_scan_are_refused(changes: dict[str, object], reason: str) -> None:
    """Every unusable setting says what was asked for and what is possible."""
    with pytest.raises(SettingError, match=reason):
        PhantomSettings(**changes)  # type: ignore[arg-type]


def test_a_lesion_is_typed_as_a_range() -> None:
    """FIRST:END and none are read, anything else is refused."""
    assert parse_lesion("40:60") == (40, 60)
    assert parse_lesion("none") is None
    for text in ("40", "40-60", ":", "a:b", "-1:4"):
        with pytest.raises(SettingError, match="FIRST:END"):
            parse_lesion(text)
