"""An evaluation on graphs whose answers can be told beforehand: what is counted, and what the report says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import probe_network
from groundglass.errors import CheckpointError, ModelError, RepositoryError
from groundglass.study import Study
from groundglass_client import intake
from groundglass_export.evaluation import (
    EvaluationReport,
    ModelIdentity,
    Predictions,
    Predictor,
    build_report,
    evaluate,
    opened_set,
    read_labelled_set,
)
from groundglass_export.evaluation.local import LocalModel, open_checkpoint, open_model
from groundglass_export.evaluation.prediction import DecodeHu

SIDE = 256  # of which a mask's resampling to 512 is exact
BRIGHT, DARK = 255, 20  # 150 HU and -1232 HU: the probe network marks from 0 HU
SET = """
checkpoint_sha256 = "c0ffee00c0ffee00"
[[source]]
name = "scans"
kind = "masked_images"
seen = "chosen on"
folder = "ct"
masks = "masks"
scan_starts = [0, 100, 200]
[[source]]
name = "singles"
kind = "labelled_images"
seen = "never"
positive = "yes"
negative = "no"
"""


def write_slice(path: Path, lesion: bool, *, shift: int = 0) -> None:
    """A dark image, with a bright square where it shows a lesion; ``shift`` moves the square down."""
    image = np.full((SIDE, SIDE), DARK if path.parent.name != "masks" else 0, dtype=np.uint8)
    if lesion:
        image[64 + shift : 128 + shift, 64:128] = BRIGHT
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scans and four single images.

    Scan 0: 16 lesion slices, found. Scan 1: 17 lesion slices, of which the middle one looks healthy, so the longest run
    is 8; the masks lie half a square lower than what is found. Scan 2: 3 healthy slices, too short for a verdict.
    """
    root = tmp_path_factory.mktemp("set")
    (root / "set.toml").write_text(SET)
    for number in range(16):
        write_slice(root / "ct" / f"{number}.png", True)
        write_slice(root / "masks" / f"{number}.png", True)
    for number in range(100, 117):
        write_slice(root / "ct" / f"{number}.png", number != 108)
        write_slice(root / "masks" / f"{number}.png", True, shift=32)
    for number in range(200, 203):
        write_slice(root / "ct" / f"{number}.png", False)
        write_slice(root / "masks" / f"{number}.png", False)
    for name, lesion in (
        ("yes/a-p1-1.png", True),
        ("yes/b-p1-1.png", False),
        ("no/1%1.png", True),
        ("no/2.png", False),
    ):
        write_slice(root / name, lesion)
    return root


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probe network's two graphs, as a repository holds them."""
    root = tmp_path_factory.mktemp("repository")
    for name, model in (("preprocess", probe_network.preprocess()), ("unet", probe_network.unet())):
        (root / name / "1").mkdir(parents=True)
        onnx.save(model, root / name / "1" / "model.onnx")
    return root


@pytest.fixture(scope="module")
def model(repository: Path) -> LocalModel:
    """The same, opened as the command opens it."""
    return open_model(repository / "unet" / "1" / "model.onnx")


def report_of(root: Path, predictor: Predictor) -> EvaluationReport:
    """The set through a predictor."""
    labelled = read_labelled_set(root / "set.toml")
    with opened_set(labelled, root, intake) as sources:
        return build_report(labelled, evaluate(sources, predictor, intake.decode_hu))


@pytest.fixture(scope="module")
def report(root: Path, model: LocalModel) -> EvaluationReport:
    """The set through the probe network."""
    return report_of(root, model)


def test_slices_are_counted_by_source_and_overall(report: EvaluationReport) -> None:
    """32 of 33 lesion slices are found; of the single images one of two, and one of two is spared."""
    scans, singles = report.sources
    assert (scans.slices.sensitivity.hits, scans.slices.sensitivity.total) == (32, 33)
    assert (scans.slices.specificity.hits, scans.slices.specificity.total) == (3, 3)
    assert (singles.slices.sensitivity.hits, singles.slices.specificity.hits) == (1, 1)
    assert (singles.slices.groups, scans.slices.groups) == (4, 3)
    unseen, everything = report.overall
    assert (unseen.name, unseen.slices.slices) == ("all never seen", 4)
    assert (everything.slices.slices, everything.slices.sensitivity.total, everything.seen) == (40, 35, "various")


def test_dice_is_counted_on_the_served_grid(report: EvaluationReport) -> None:
    """16 slices overlap fully, 16 by half, one is missed: its 0 counts."""
    dice = report.sources[0].dice
    assert dice is not None
    assert dice.slices == 33
    assert dice.mean.value == pytest.approx((16 + 16 * 0.5) / 33)
    assert dice.median.value == 0.5
    assert dice.pooled.value == pytest.approx(2 * (16 + 8) / (32 + 33))
    assert (dice.resampled, dice.units) == ("groups", 2), "the scan without a lesion has no dice to draw"
    found = next(item for item in report.evaluation.slices if item.label)
    assert (found.pixels, found.expert_pixels) == (128 * 128, 128 * 128)
    assert report.sources[1].dice is None


def test_only_scans_of_fifteen_slices_have_a_verdict(report: EvaluationReport) -> None:
    """The broken run misses its scan; three slices and single images make none."""
    assert [(scan.scan, scan.longest_run, scan.label, scan.positive) for scan in report.evaluation.scans] == [
        ("scans scan 0", 16, True, True),
        ("scans scan 1", 8, True, False),
    ]
    assert report.sources[1].scans.scans == 0
    f1 = report.sources[0].scans.f1
    assert f1 is not None
    assert f1.value == pytest.approx(2 / 3)


def test_a_stated_scan_truth_overrules_the_slices(root: Path, model: LocalModel, tmp_path: Path) -> None:
    """A patient known to be ill is positive however few slices are labelled, and one known to be healthy negative."""
    path = tmp_path / "set.toml"
    path.write_text(SET.replace("scan_starts", "scan_positive = false\nscan_starts"))
    labelled = read_labelled_set(path)
    with opened_set(labelled, root, intake) as sources:
        found = evaluate(sources[:1], model, intake.decode_hu)
    assert [scan.label for scan in found.scans] == [False, False]


def test_the_report_names_model_and_set(report: EvaluationReport, root: Path, repository: Path) -> None:
    """JSON holds the digests of both, and what was seen; it is plain JSON without NaN."""
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["model"]["sha256"] == report.evaluation.model.sha256
    assert len(content["set"]["sha256"]) == len(content["set"]["slices_sha256"]) == 64
    assert [row["seen"] for row in content["sources"]] == ["chosen on", "never"]
    assert content["sources"][1]["scans"]["sensitivity"] == {
        "hits": 0, "total": 0, "value": None, "ci95": None, "ci95_by_group": None,
    }  # fmt: skip
    assert len(content["slices"]) == 40
    assert content["model"]["versions"].keys() >= {"groundglass", "onnxruntime"}


def test_the_text_holds_three_tables_and_the_methods(report: EvaluationReport) -> None:
    """Figures with their interval, the method of each, and the note that `seen` speaks of another checkpoint."""
    text = report.as_text()
    assert "0.970 (0.847 to 0.995)" in text, "32 of 33, by Wilson"
    assert "\nmasks " in text
    assert "\nscans (15 in a row) " in text
    for word in ("Wilson", "bootstrap", "F1 = 2x / (1 + x)", "stated for checkpoint c0ffee00c0ff", "Not for diagnosis"):
        assert word in text


def test_the_digest_follows_pixels_and_labels(root: Path, model: LocalModel, report: EvaluationReport) -> None:
    """It repeats on the same slices, and changes with a mask."""
    labelled = read_labelled_set(root / "set.toml")
    with opened_set(labelled, root, intake) as (scans, singles):
        first = scans.scans[0]
        assert first.masks is not None
        changed = replace(scans, scans=(replace(first, masks=np.zeros_like(first.masks)), *scans.scans[1:]))
        same = evaluate((scans, singles), model, intake.decode_hu)
        other = evaluate((changed, singles), model, intake.decode_hu)
    assert same.slices_sha256 == report.evaluation.slices_sha256 != other.slices_sha256


class _Altered:
    """A predictor whose answers are damaged on the way."""

    def __init__(self, model: LocalModel, damage: Callable[[Predictions], Predictions]) -> None:
        self._model = model
        self._damage = damage

    def predict(self, study: Study, decode_hu: DecodeHu, on_slices: Callable[[int], None]) -> Predictions:
        return self._damage(self._model.predict(study, decode_hu, on_slices))

    def identity(self) -> ModelIdentity:
        return self._model.identity()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda found: replace(found, pixels=found.pixels + 1),
            "the model counts 16385 lesion pixels in a mask",
        ),
        (lambda found: replace(found, masks=found.masks[1:]), "15 answers came to 16 slices"),
    ],
)
def test_answers_that_contradict_themselves_are_refused(
    damage: Callable[[Predictions], Predictions], words: str, root: Path, model: LocalModel
) -> None:
    """A table is never made of a mask and a count that don't belong together."""
    with pytest.raises(ModelError, match=words):
        report_of(root, _Altered(model, damage))


def test_notes_say_when_a_server_is_of_several_minds(root: Path, model: LocalModel) -> None:
    """Two versions that answered, and another run than 15, are told beside the figures."""

    class Served(_Altered):
        def identity(self) -> ModelIdentity:
            return ModelIdentity(way="server", name="here:1", version="1 and 2", positive_run=10)

    notes = report_of(root, Served(model, lambda found: found)).notes
    assert any("versions 1 and 2" in note for note in notes)
    assert any("from 10 slices in a row" in note for note in notes)
    assert any("this server does not name one" in note for note in notes)


def test_models_that_are_not_there_are_named(tmp_path: Path) -> None:
    """A graph and a checkpoint alike."""
    with pytest.raises(ModelError, match=r"gone\.onnx: no such file"):
        open_model(tmp_path / "gone.onnx")
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        open_checkpoint(tmp_path / "gone.safetensors")


def test_a_graph_that_is_not_its_manifests_is_refused(tmp_path: Path) -> None:
    """Figures are never given to the wrong file."""
    shipped = Path(__file__).parents[2] / "model_repository" / "unet" / "1"
    onnx.save(probe_network.unet(), tmp_path / "model.onnx")
    (tmp_path / "model.onnx.manifest.json").write_text((shipped / "model.onnx.manifest.json").read_text())
    with pytest.raises(RepositoryError, match="is not the file of its manifest"):
        open_model(tmp_path / "model.onnx")
