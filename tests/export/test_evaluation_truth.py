"""The truth of a labelled set: masks on the served grid, labels in the order of the slices, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from groundglass.errors import GroundglassError, SettingError
from groundglass.study import SliceSource
from groundglass_client import intake
from groundglass_export.evaluation import opened_set, read_labelled_set
from groundglass_export.evaluation.truth import (
    labels_in_order,
    read_mask,
    read_slice_labels,
    served_size,
)
from groundglass_export.file_names import publication
from groundglass_export.training.augment import plain
from groundglass_export.training.slices import TrainingSlice

READY_SET = Path(__file__).parents[2] / "export" / "evaluation" / "reference.toml"
IMAGES = 'name = "images"\nkind = "masked_images"\nseen = "never"\nfolder = "ct"\nmasks = "masks"\n'


def source(index: int, file: str) -> SliceSource:
    """A slice of a series."""
    return SliceSource(index, Path(file), file, 0, 8, 8, None)


def write_grey(path: Path, grey: Any) -> None:
    """An 8-bit image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(grey, dtype=np.uint8)).save(path)


def write_set(path: Path, *sources: str) -> Path:
    """A labelled set of some sources."""
    path.write_text("".join(f"[[source]]\n{text}\n" for text in sources), encoding="utf-8")
    return path


@given(arrays(np.bool_, (256, 256), elements=st.booleans()))
def test_every_pixel_of_a_mask_of_half_the_size_becomes_four(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    """Upsampling by two neither loses nor invents a pixel."""
    assert np.array_equal(served_size(mask), mask.repeat(2, axis=0).repeat(2, axis=1))


def test_a_mask_of_the_served_size_stays_as_it_is() -> None:
    """512x512 is not resampled."""
    mask = np.random.default_rng(1).random((512, 512)) < 0.5
    assert np.array_equal(served_size(mask), mask)


@pytest.mark.parametrize("shape", [(256, 256), (300, 400), (512, 300), (768, 1024), (1400, 900)])
def test_masks_are_resampled_as_in_training(shape: tuple[int, int]) -> None:
    """A blob of any size lands where the trainer's own resampling puts it, but for pixels at exactly one half."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    mask = (np.hypot(y - 0.2, x + 0.1) < 0.43) & (np.sin(9 * x) > -0.6)
    item = TrainingSlice("a", "s", np.zeros(shape, np.uint8), mask, False)
    expected = plain(item, 512)[1].numpy()[0] >= 0.5
    assert (served_size(mask) != expected).sum() <= 3


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    """Both sizes and the file are named."""
    write_grey(tmp_path / "a.png", np.zeros((30, 40)))
    with pytest.raises(SettingError, match=r"a\.png: a mask of 30 x 40 for an image of 40 x 40"):
        read_mask(tmp_path / "a.png", (40, 40))


def test_a_mask_of_zeros_and_ones_is_refused(tmp_path: Path) -> None:
    """Read as 0 and 255 it would hold no lesion, and every slice would count as healthy."""
    write_grey(tmp_path / "a.png", np.eye(40))
    with pytest.raises(SettingError, match="greys up to 1;"):
        read_mask(tmp_path / "a.png", (40, 40))


def test_an_unreadable_mask_is_named(tmp_path: Path) -> None:
    """So is one that is missing."""
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(SettingError, match=r"a\.png is no readable mask"):
        read_mask(tmp_path / "a.png", (40, 40))
    with pytest.raises(SettingError, match=r"b\.png: no such mask"):
        read_mask(tmp_path / "b.png", (40, 40))


def test_labels_follow_the_slices_whatever_their_own_order() -> None:
    """A label finds its slice by the path in the study or by the bare name."""
    slices = [source(0, "in/b.dcm"), source(1, "in/a.dcm"), source(2, "in/c.dcm")]
    assert labels_in_order({"a.dcm": True, "in/c.dcm": False, "b.dcm": False}, slices, Path("l.json")) == (
        False,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("labels", "files", "words"),
    [
        ({"a": True}, ["a", "b"], r"l\.json: 1 of 2 slices have no label; the first is b"),
        ({"a": True, "b": False, "z": True}, ["a", "b"], "1 of 3 labels name no slice of the series, which has 2"),
        ({"a": True}, ["a", "a"], "a file of the series holds several slices"),
    ],
    ids=["missing label", "more labels than slices", "several slices in a file"],
)
def test_labels_that_do_not_fit_the_series_are_refused(labels: dict[str, bool], files: list[str], words: str) -> None:
    """Nothing is guessed: every slice has one label, every label has one slice."""
    with pytest.raises(SettingError, match=words):
        labels_in_order(labels, [source(index, file) for index, file in enumerate(files)], Path("l.json"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "expected a JSON list"),
        ("[]", "at least one entry"),
        ("[", "no readable JSON"),
        ('[{"infected": 1}]', "entry 0 names no file"),
        ('[{"file": "a"}]', "the label of a has no infected"),
        ('[{"file": "a", "infected": 2}]', "has 2; expected infected to be 0 or 1"),
        ('[{"file": "a", "infected": "0"}]', "has '0'"),
        ('[{"file": "a", "infected": [1]}]', r"has \[1\]"),
        ('[{"file": "a", "infected": 1}, {"file": "a", "infected": 0}]', "a is labelled twice"),
    ],
)
def test_a_file_that_holds_no_labels_is_refused(content: str, words: str, tmp_path: Path) -> None:
    """Each way of being wrong has its own line, and it names the file."""
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(SettingError, match=words) as raised:
        read_slice_labels(tmp_path / "labels.json", "infected")
    assert "labels.json" in str(raised.value)


def test_another_set_of_labels_can_be_chosen(tmp_path: Path) -> None:
    """The key decides which of a file's labels count."""
    (tmp_path / "labels.json").write_text(json.dumps([{"file": "a", "infected": 1, "first": 0}]))
    assert read_slice_labels(tmp_path / "labels.json", "first") == {"a": False}


def test_images_of_one_publication_share_its_name() -> None:
    """What comes before the page or the panel."""
    names = ["2020.01.24.919183-p27-132.png", "2020.02.10.20021584-p6-52%10.png", "11%2.png", "1101.png", "a-part.png"]
    assert [publication(name) for name in names] == ["2020.01.24.919183", "2020.02.10.20021584", "11", "1101", "a-part"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"set\.toml is empty"),
        ("[[source]", r"set\.toml is unreadable"),
        ("[source]\nname = 1", "source or checkpoint_sha256 of another type"),
        ("colour = 1", "found colour"),
        ('[[source]]\nname = "a"\nkind = "x_rays"', "source a: kind 'x_rays', expected one of masked_images, "),
        ('[[source]]\nname = "a"', "source a: kind None"),
        (f'[[source]]\n{IMAGES}label = "b"', "unknown key label"),
        ('[[source]]\nname = "a"\nkind = "healthy_series"\nfolder = "f"', "source a: seen is missing"),
        ('[[source]]\nname = "a"\nkind = "healthy_series"\nfolder = "f"\nseen = "once"', "expected one of trained on"),
        (f"[[source]]\n{IMAGES}scans = [1]", "scan 1 asked for; scan_starts names 1, from 0"),
        (f"[[source]]\n{IMAGES}scan_starts = [5, 3]", "expected rising numbers"),
        (f"[[source]]\n{IMAGES}scan_starts = 5", "scan_starts = 5, expected a list of whole numbers"),
        (f'[[source]]\n{IMAGES}scan_positive = "yes"', "expected true or false"),
        (f"[[source]]\n{IMAGES}[[source]]\n{IMAGES}", "two sources are called 'images'"),
    ],
)
def test_a_set_that_is_none_is_refused_by_name(text: str, words: str, tmp_path: Path) -> None:
    """Each slip of the pen has its own line, and it names the file and the source."""
    (tmp_path / "set.toml").write_text(text)
    with pytest.raises(SettingError, match=words) as raised:
        read_labelled_set(tmp_path / "set.toml")
    assert "set.toml" in str(raised.value)


def test_a_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The path, and what was expected there."""
    with pytest.raises(SettingError, match=r"gone\.toml: no such file"):
        read_labelled_set(tmp_path / "gone.toml")


def test_masked_images_are_parted_into_scans_and_ordered_by_number(tmp_path: Path) -> None:
    """Scans begin where the set says; within one, 9 comes before 10; an empty mask is a negative slice."""
    for number, lesion in ((9, 1), (10, 0), (2, 1), (30, 1)):
        write_grey(tmp_path / "ct" / f"{number}.png", np.full((64, 64), number))
        write_grey(tmp_path / "masks" / f"{number}.png", np.full((64, 64), 255 * lesion))
    path = write_set(tmp_path / "set.toml", IMAGES + "scan_starts = [0, 5, 20]\nscans = [1, 0]")
    with opened_set(read_labelled_set(path), tmp_path, intake) as (opened,):
        first, second = opened.scans
    assert [item.file for item in first.study.slices] == ["9.png", "10.png"]
    assert [item.index for item in first.study.slices] == [0, 1]
    assert first.labels == (True, False)
    assert first.masks is not None
    assert np.unpackbits(first.masks, axis=2).sum(axis=(1, 2)).tolist() == [512 * 512, 0]
    assert [item.file for item in second.study.slices] == ["2.png"]


def test_single_images_of_any_size_are_one_lot_without_a_scan(tmp_path: Path) -> None:
    """Images of two folders travel together; their groups are the publications."""
    for folder, names in (("yes", ["a-p1-2.png", "a-p1-3.png"]), ("no", ["7%1.png"])):
        for place, name in enumerate(names):
            write_grey(tmp_path / folder / name, np.zeros((40 + place, 50)))
    text = 'name = "x"\nkind = "labelled_images"\nseen = "never"\npositive = "yes"\nnegative = "no"'
    path = write_set(tmp_path / "set.toml", text)
    with opened_set(read_labelled_set(path), tmp_path, intake) as (opened,):
        (lot,) = opened.scans
    assert lot.labels == (True, True, False)
    assert lot.groups == ("x a", "x a", "x 7")
    assert not lot.is_scan
    assert [(item.rows, item.index) for item in lot.study.slices] == [(40, 0), (41, 1), (40, 2)]


@pytest.mark.parametrize(
    ("files", "text", "words"),
    [
        ({"ct/1.png": 0}, IMAGES, r"masks.1\.png: no such mask"),
        ({"ct/1.png": 0, "masks/1.png": 0}, IMAGES + "scan_starts = [0, 5]", "no image of scan 1, which starts at 5"),
        ({"ct/1.png": 0, "ct/notes.txt": 0}, IMAGES, r"notes\.txt is neither PNG nor JPEG"),
        ({"masks/1.png": 0}, IMAGES, "ct: no such folder"),
        ({"ct/.hidden": 0}, IMAGES, "no PNG or JPEG image found"),
        (
            {"x": 0},
            'name = "h"\nkind = "healthy_series"\nseen = "never"\nfolder = "scan"',
            "scan: does not exist",
        ),
    ],
)
def test_slices_that_are_not_there_are_named(files: dict[str, int], text: str, words: str, tmp_path: Path) -> None:
    """Before any network runs, and by the path that was looked for."""
    for name, grey in files.items():
        if name.endswith(".png"):
            write_grey(tmp_path / name, np.full((64, 64), grey))
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("")
    labelled = read_labelled_set(write_set(tmp_path / "set.toml", text))
    with pytest.raises(GroundglassError, match=words), opened_set(labelled, tmp_path, intake):
        pytest.fail("a set with holes was opened")


def test_a_data_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With the option that names another."""
    labelled = read_labelled_set(write_set(tmp_path / "set.toml", IMAGES))
    with (
        pytest.raises(SettingError, match=r"gone: no such folder; .*--data"),
        opened_set(labelled, tmp_path / "gone", intake),
    ):
        pytest.fail("a folder that is not there was opened")


def test_the_ready_set_opens_on_the_real_data(data_root: Path) -> None:
    """Its sources hold the slices that the data's description counts, of single images those of three folds."""
    with opened_set(read_labelled_set(READY_SET), data_root, intake) as opened:
        counts = {item.source.name: [(len(scan.labels), sum(scan.labels)) for scan in item.scans] for item in opened}
    assert counts == {
        "lesion slices": [(35, 35), (90, 90), (56, 56)],
        "P001": [(148, 80)],
        "normal001": [(154, 0)],
        "covid_ct_images": [(123, 56)],
        "covid_ct_images, fold 2": [(54, 32)],
    }
