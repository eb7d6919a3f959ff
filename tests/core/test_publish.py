"""Files appear whole or not at all."""

from pathlib import Path

import pytest

from groundglass.publish import published


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """An error while writing keeps the old content and removes the half-written file."""
    path = tmp_path / "report.json"
    path.write_text("old")

    def write_half() -> None:
        with published(path) as beside:
            beside.write_text("half")
            raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_published_under_its_name_in_a_new_folder(tmp_path: Path) -> None:
    """The folder is made, and only the finished file is in it."""
    path = tmp_path / "new" / "report.json"
    with published(path) as beside:
        beside.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]
