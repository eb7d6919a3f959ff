"""`groundglass evaluate`: a checkpoint, a graph and a live server give the same tables; what it refuses is one line."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command import assert_one_clear_line, groundglass
from groundglass.contract import LUNG_WINDOW_CENTRE_HU, LUNG_WINDOW_WIDTH_HU
from groundglass_client.intake import open_study
from groundglass_client.phantom import PhantomSettings, write_phantom
from groundglass_client.phantom.chest import Chest
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings

PROJECT = Path(__file__).parents[2]
CHECKPOINT = PROJECT / "export" / "weights" / "groundglass_unet.safetensors"
LESION = (2, 18)
SLICES = 20
SIDE = 128
PICTURES = """
[[source]]
name = "pictures"
kind = "masked_images"
seen = "trained on"
folder = "ct"
masks = "masks"
scan_starts = [0, 10]
[[source]]
name = "singles"
kind = "labelled_images"
seen = "never"
positive = "yes"
negative = "no"
"""
SCANS = """
[[source]]
name = "phantom"
kind = "labelled_series"
seen = "never"
folder = "ill"
labels = "labels.json"
[[source]]
name = "healthy"
kind = "healthy_series"
seen = "chosen on"
folder = "well"
"""
FEW = """
[[source]]
name = "few"
kind = "healthy_series"
seen = "never"
folder = "few"
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled phantom of 20 slices with 16 of ground glass, the same without; pictures of some slices, with masks,
    and single pictures of two sizes.
    """
    root = tmp_path_factory.mktemp("labelled")
    settings = PhantomSettings(slices=SLICES, lesion=LESION, rows=SIDE, columns=SIDE)
    write_phantom(settings, root / "ill")
    write_phantom(PhantomSettings(slices=SLICES, rows=SIDE, columns=SIDE), root / "well")
    write_phantom(PhantomSettings(slices=3, rows=SIDE, columns=SIDE), root / "few")
    with open_study(root / "ill") as study:
        labels = [
            {"file": item.file, "infected": int(LESION[0] <= item.index < LESION[1])} for item in reversed(study.slices)
        ]
    (root / "labels.json").write_text(json.dumps(labels))
    write_pictures(Chest(settings), root)
    (root / "set.toml").write_text(PICTURES + SCANS)
    (root / "short.toml").write_text(PICTURES + FEW)
    return root


def write_pictures(chest: Chest, root: Path) -> None:
    """Two slices of one scan and one of another with their masks; one ill and one well slice on their own."""
    for folder in ("ct", "masks", "yes", "no"):
        (root / folder).mkdir()
    for number, index in ((4, 8), (5, 0), (11, 12)):
        Image.fromarray(picture(chest, index)).save(root / "ct" / f"{number}.png")
        Image.fromarray(chest.lesion(index).astype(np.uint8) * 255).save(root / "masks" / f"{number}.png")
    Image.fromarray(picture(chest, 10)).save(root / "yes" / "paper-p1-1.png")
    Image.fromarray(picture(chest, 19)[:, 10:110]).save(root / "no" / "other%0.png")


def picture(chest: Chest, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A slice in the lung window, 8 bits."""
    shade = (chest.hu(index) - LUNG_WINDOW_CENTRE_HU) / LUNG_WINDOW_WIDTH_HU + 0.5
    return np.rint(shade.clip(0, 1) * 255).astype(np.uint8)


def evaluated(labelled: Path, *way: str | Path) -> dict[str, Any]:
    """The JSON of an evaluation that must succeed."""
    done = groundglass("evaluate", "--set", labelled, *way, "--json", "-", timeout_s=280)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def figures(content: dict[str, Any]) -> dict[str, Any]:
    """Everything but when, by what and on what remark: tables, scans, every slice, the digest of the slices."""
    return {key: value for key, value in content.items() if key not in ("created", "model", "notes")}


@pytest.mark.triton
def test_a_server_gives_the_figures_of_its_graph(
    root: Path, probe_server: EmbeddedTriton, probe_repository: Path
) -> None:
    """The probe network, live and as a file: the same tables, slices and digests; scans of 20 slices have verdicts."""
    graph = evaluated(root / "set.toml", "--model", probe_repository / "unet" / "1" / "model.onnx")
    served = evaluated(root / "set.toml", "--server", probe_server.grpc_address)
    assert figures(graph) == figures(served)
    assert [scan["scan"] for scan in graph["scans"]] == ["phantom", "healthy"]
    assert [row["slices"]["count"] for row in graph["sources"]] == [3, 2, 20, 20]
    assert [row["name"] for row in graph["overall"]] == ["all never seen", "all"]
    assert served["model"]["version"] == "1"
    assert len({item["pixels"] for item in graph["slices"]}) > 20, "answers that tell slices apart"


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkpoint_graph_and_server_give_the_same_figures(root: Path, fp32_repository: Path) -> None:
    """The shipped network in FP32, three ways: every mask, count, verdict and figure is the same."""
    graph = evaluated(root / "short.toml", "--model", fp32_repository / "unet" / "1" / "model.onnx")
    checkpoint = evaluated(root / "short.toml", "--checkpoint", CHECKPOINT)
    with EmbeddedTriton(ServeSettings(fp32_repository)) as triton:
        served = evaluated(root / "short.toml", "--server", triton.grpc_address)
    assert figures(graph) == figures(checkpoint) == figures(served)
    assert graph["model"]["checkpoint_sha256"] == checkpoint["model"]["sha256"]
    assert graph["sources"][0]["dice"]["pooled"]["value"] > 0, "masks that are compared with an empty one prove little"


def test_the_report_goes_to_a_file_and_the_tables_to_stdout(root: Path, probe_repository: Path, tmp_path: Path) -> None:
    """Tables on stdout, JSON in a file in a folder that is made, nothing on stderr."""
    model = probe_repository / "unet" / "1" / "model.onnx"
    out = tmp_path / "new" / "report.json"
    done = groundglass("evaluate", "--set", root / "set.toml", "--model", model, "--json", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    row = next(line for line in done.stdout.splitlines() if line.startswith("phantom"))
    assert re.search(r"never +20 +1 +16 +4 +\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)", row)
    assert json.loads(out.read_text())["schema_version"] == 1
    assert [path.name for path in out.parent.iterdir()] == ["report.json"]


def test_what_can_not_be_evaluated_is_one_clear_line(root: Path, probe_repository: Path, tmp_path: Path) -> None:
    """Two models, none, one that is not there, a bad address, data that is not there, a report that is a folder."""
    labelled, model = root / "set.toml", probe_repository / "unet" / "1" / "model.onnx"
    for arguments, words in (
        (("--set", labelled, "--model", model, "--server", "a:1"), ("--model and --server given", "name one model")),
        (("--set", labelled), ("none given",)),
        (("--set", labelled, "--checkpoint", tmp_path / "gone.pt"), ("gone.pt: no such file",)),
        (("--set", labelled, "--server", "nowhere"), ("nowhere", "HOST:PORT")),
        (("--set", labelled, "--data", tmp_path, "--model", model), ("ct: no such folder",)),
        (("--set", labelled, "--model", model, "--json", tmp_path), ("is a folder",)),
    ):
        assert_one_clear_line(groundglass("evaluate", *arguments), *words)


def test_the_help_ends_in_a_runnable_example() -> None:
    """It shows how the command is called."""
    done = groundglass("evaluate", "--help")
    assert done.returncode == 0
    assert "Example: groundglass evaluate --set " in " ".join(done.stdout.split())


def test_a_graph_is_evaluated_without_torch(root: Path, probe_repository: Path) -> None:
    """Where torch can't be imported, a graph is evaluated as ever: only a checkpoint needs it."""
    model = probe_repository / "unet" / "1" / "model.onnx"
    program = f"""
import subprocess
import sys
sys.modules["torch"] = None
sys.argv = ["groundglass", "evaluate", "--set", {str(root / "set.toml")!r}, "--model", {str(model)!r}]
from groundglass.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Not for diagnosis." in done.stdout
