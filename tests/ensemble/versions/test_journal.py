"""The journal says who did what; a crash tears at most its last line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from groundglass.errors import RepositoryError
from groundglass_ensemble.versions.journal import BEGUN, DONE, Journal


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    """Action, version, outcome, signer, digests, reason and details are read again, in order."""
    journal = Journal(tmp_path, "me@here")
    first = journal.write("stage", 2, BEGUN, details={"from": 1})
    second = journal.write("stage", 2, DONE, digests={"model.onnx": "ab"}, reason="so")
    assert journal.records() == (first, second)
    assert Journal(tmp_path).records() == (first, second)
    assert first.who == "me@here"
    assert all(json.loads(line) for line in journal.path.read_text().splitlines())


def test_a_torn_line_hides_nothing_else(tmp_path: Path) -> None:
    """Half a record, as a crash leaves it, is left out; what is written later stands on a line of its own."""
    journal = Journal(tmp_path, "me")
    first = journal.write("stage", 2, DONE)
    with journal.path.open("a") as stream:
        stream.write('{"action": "promote", "ver')
    assert journal.records() == (first,)
    third = journal.write("verify", 2, BEGUN)
    assert journal.records() == (first, third)


def test_what_has_no_end_is_pending(tmp_path: Path) -> None:
    """An announcement without an outcome is pending, and nothing else is."""
    journal = Journal(tmp_path)
    assert journal.pending() is None
    begun = journal.write("promote", 3, BEGUN)
    assert journal.pending() == begun
    journal.write("promote", 3, DONE)
    assert journal.pending() is None


def test_the_last_done_of_a_version_is_found(tmp_path: Path) -> None:
    """Outcomes other than done, other versions and other actions are passed over."""
    journal = Journal(tmp_path)
    verified = journal.write("verify", 2, DONE)
    journal.write("verify", 2, "refused")
    staged = journal.write("stage", 3, DONE)
    retired = journal.write("retire", 2, DONE)
    assert journal.last_done(2, "verify") == verified
    assert journal.last_done(2) == retired
    assert journal.last_done(3) == staged
    assert journal.last_done(4) is None


def test_a_journal_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A missing folder is one clear error, before anything is done."""
    with pytest.raises(RepositoryError, match=r"versions\.jsonl can't be written"):
        Journal(tmp_path / "nowhere").write("stage", 2, BEGUN)
