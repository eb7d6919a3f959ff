"""The benchmark of decoders: what it writes, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = ("--slices", 2, "--workers", 1, "--repetitions", 2, "--min-seconds", 0)


def run_script(*options: object) -> subprocess.CompletedProcess[str]:
    """The script as a person calls it."""
    command = [sys.executable, str(BENCHMARKS / "decoders.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_script_writes_what_it_measured(tmp_path: Path) -> None:
    """JSON and Markdown hold rates by the clock and by CPU time, of headers and of every way to decode."""
    done = run_script("--syntax", "explicit", "--syntax", "rle", *QUICK, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "decoders.json").read_text())
    assert list(found["studies"]) == ["explicit", "rle"]
    figures = found["studies"]["rle"]
    assert figures["slices"] == 2
    assert set(figures["by_clock"]) == set(figures["by_cpu"]) == {"headers", "1 thread", "1 threads", "1 processes"}
    for rate in (*figures["by_clock"].values(), *figures["by_cpu"].values()):
        assert 0 < rate["smallest"] <= rate["median"] <= rate["largest"]
    assert {"imagecodecs", "pydicom", "numpy"} <= found["host"]["versions"].keys()
    text = (tmp_path / "decoders.md").read_text()
    assert text in done.stdout
    assert "| rle | 2 |" in text


def test_a_study_is_measured_by_its_name(data_root: Path, tmp_path: Path) -> None:
    """A study given by its path takes the phantoms' place, and no more slices are decoded than asked for."""
    done = run_script("--study", data_root / "robustness" / "tilted_nonuniform", *QUICK, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "decoders.json").read_text())
    assert {name: figures["slices"] for name, figures in found["studies"].items()} == {"tilted_nonuniform": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--syntax", "tiff"), "--syntax tiff: unknown; known are explicit, implicit"),
        (("--study", "no-such-study"), "no-such-study: does not exist"),
        (("--study", __file__), "is neither DICOM nor a picture"),
        (("--slices", 0), "--slices must be 1 or more"),
        (("--workers", -1), "--workers can't be negative"),
        (("--repetitions", 0), "--repetitions 0: expected at least 1"),
    ],
    ids=["syntax", "study", "no-study", "slices", "workers", "repetitions"],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, options: tuple[object, ...], words: str) -> None:
    """Whatever can't be measured ends the script with one line and without results."""
    done = run_script("--out", tmp_path / "results", *options)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()
