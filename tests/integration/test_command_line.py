"""The command line as its users meet it: results on stdout, one clear line when it fails, nothing left behind."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jsonschema
import numpy as np
import psutil
import pytest
from PIL import Image

from command import assert_one_clear_line, groundglass
from groundglass_ensemble.embedded import EmbeddedTriton
from own_memory import regions

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())
PNG_SIGNATURE = b"\x89PNG"


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small phantom, written by the command itself."""
    out = tmp_path_factory.mktemp("phantom") / "study"
    done = groundglass("phantom", "--slices", "12", "--lesion", "3:9", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.triton
def test_analyze_writes_report_picture_and_masks(phantom: Path, probe_server: EmbeddedTriton, tmp_path: Path) -> None:
    """The output folder holds a valid report, a picture and the masks that the report counts."""
    done = groundglass("analyze", phantom, "--server", probe_server.grpc_address, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "verdict: " in done.stdout
    assert str(tmp_path / "out" / "report.json") in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert (tmp_path / "out" / "overview.png").read_bytes().startswith(PNG_SIGNATURE)
    masks = np.load(tmp_path / "out" / "masks.npz")["mask"]
    assert np.unpackbits(masks, axis=-1).sum(axis=(1, 2)).tolist() == [
        item["lesion_pixels"] for item in report["slices"]
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "overview.png", "masks.npz"}


@pytest.mark.triton
def test_json_goes_to_stdout_alone(phantom: Path, probe_server: EmbeddedTriton) -> None:
    """With --json - the output is the report and nothing else."""
    done = groundglass("analyze", phantom, "--server", probe_server.grpc_address, "--json", "-")
    jsonschema.validate(json.loads(done.stdout), SCHEMA)


@pytest.mark.triton
def test_a_zip_gives_the_same_slices_as_its_folder(phantom: Path, probe_server: EmbeddedTriton, tmp_path: Path) -> None:
    """A zipped study has the verdicts of the folder that it holds."""
    archive = tmp_path / "study.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in phantom.rglob("*.dcm"):
            packed.write(file, file.relative_to(phantom))
    reports = [
        json.loads(groundglass("analyze", study, "--server", probe_server.grpc_address, "--json", "-").stdout)
        for study in (phantom, archive)
    ]
    first, second = ([(item["position_mm"], item["lesion_pixels"]) for item in report["slices"]] for report in reports)
    assert first == second


@pytest.mark.triton
def test_a_folder_of_images_is_a_study(probe_server: EmbeddedTriton, tmp_path: Path) -> None:
    """8-bit PNG slices that are not square are analysed in the order of their numbers, 9 before 10."""
    for number, grey in ((9, 255), (10, 10), (11, 255)):
        Image.fromarray(np.full((200, 300), grey, np.uint8)).save(tmp_path / f"slice{number}.png")
    done = groundglass("analyze", tmp_path, "--server", probe_server.grpc_address, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert [item["positive"] for item in json.loads(done.stdout)["slices"]] == [True, False, True]


def test_images_of_two_sizes_are_refused_by_name(tmp_path: Path) -> None:
    """Images of one scan have one size; the one that differs is named."""
    for number, side in enumerate((256, 256, 128)):
        Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / f"slice{number}.png")
    assert_one_clear_line(groundglass("analyze", tmp_path, "--server", "127.0.0.1:1"), "slice2.png", "128 x 128")


def test_an_unreachable_server_is_one_clear_line(phantom: Path) -> None:
    """A server that isn't there is named, within its patience and without a traceback."""
    assert_one_clear_line(groundglass("analyze", phantom, "--server", "127.0.0.1:1"), "127.0.0.1:1", "UNAVAILABLE")


def test_a_server_that_is_no_address_is_refused(phantom: Path) -> None:
    """A malformed --server is named as such."""
    assert_one_clear_line(groundglass("analyze", phantom, "--server", "nowhere"), "nowhere", "HOST:PORT")


def test_an_empty_folder_is_refused_by_name(tmp_path: Path) -> None:
    """An empty folder is no study."""
    assert_one_clear_line(groundglass("analyze", tmp_path, "--server", "127.0.0.1:1"), str(tmp_path))


def test_a_study_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    """A path that doesn't exist is named."""
    assert_one_clear_line(groundglass("analyze", tmp_path / "gone", "--server", "127.0.0.1:1"), "gone")


def test_a_lesion_range_that_is_none_is_refused(tmp_path: Path) -> None:
    """--lesion takes FIRST:END inside the scan, and nothing is written otherwise."""
    assert_one_clear_line(groundglass("phantom", "--lesion", "abc", "--out", tmp_path / "p"), "FIRST:END")
    assert_one_clear_line(groundglass("phantom", "--slices", "5", "--lesion", "3:9", "--out", tmp_path / "p"), "3:9")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("command", [["analyze"], ["serve"], ["phantom"], ["export", "onnx"]], ids=" ".join)
def test_every_help_ends_in_a_runnable_example(command: list[str]) -> None:
    """Each command's help shows how it is called."""
    done = groundglass(*command, "--help")
    assert done.returncode == 0
    assert f"Example: groundglass {' '.join(command)}" in " ".join(done.stdout.split())


@pytest.mark.triton
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
def test_serve_stops_in_order_and_leaves_nothing(probe_repository: Path, number: signal.Signals) -> None:
    """Ctrl-C and a plain kill end `serve` with no process and no shared memory left."""
    command = [sys.executable, "-m", "groundglass", "serve", "--repository", str(probe_repository)]
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    before = regions("")
    # A shell that starts the tests in the background has them ignore Ctrl-C, and what they start with them.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready: gRPC 127.0.0.1:")
    family = psutil.Process(process.pid).children(recursive=True)
    assert any(child.name() == "tritonserver" for child in family)
    process.send_signal(number)
    process.wait(30)
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(child.is_running() for child in family) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in family if child.is_running()]
    assert regions("") <= before


@pytest.mark.triton
def test_serve_tells_why_the_server_ended_by_itself(probe_repository: Path) -> None:
    """kill -9 of the server ends `serve` with exit code 1 and one clear line."""
    command = [sys.executable, "-m", "groundglass", "serve", "--repository", str(probe_repository)]
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready: ")
    family = psutil.Process(process.pid).children(recursive=True)
    next(child for child in family if child.name() == "tritonserver").kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.startswith("groundglass: the Triton server ended by itself")


def test_a_repository_without_its_network_is_refused(phantom: Path, probe_repository: Path, tmp_path: Path) -> None:
    """A repository that lacks a model file is refused before a server is booted, and the model is named."""
    broken = tmp_path / "repository"
    shutil.copytree(probe_repository, broken)
    (broken / "unet" / "1" / "model.onnx").unlink()
    assert_one_clear_line(groundglass("analyze", phantom, "--repository", broken), "unet", "model.onnx")
