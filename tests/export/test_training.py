"""Training on a few small slices: it repeats, resumes, stops with a reason, and reads its data by scan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from groundglass.errors import CheckpointError, ModelError, SettingError
from groundglass_export.checkpoint import load_checkpoint
from groundglass_export.network import XceptionEncoder
from groundglass_export.training import loop
from groundglass_export.training.augment import augmented, equalise, plain
from groundglass_export.training.calibrate import THRESHOLDS, Scores, choose_calibration
from groundglass_export.training.imagenet import load_imagenet
from groundglass_export.training.loop import Budget, train
from groundglass_export.training.loss import bce_dice, dice
from groundglass_export.training.opacity import add_opacity, lungs
from groundglass_export.training.recipe import Recipe, Source, Stage, read_recipe
from groundglass_export.training.slices import TrainingSlice, read_series_hu, read_source

RECIPES = Path(__file__).parents[2] / "export" / "recipes"
SOURCE = Source("masked_images", "images", masks="masks", scan_starts=(0, 10))
RECIPE = Recipe((SOURCE,), (Stage(1.0, 32, 2, (0.8, 1.2)),))


@pytest.fixture(scope="module")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six 8-bit images of two scans, numbered 0-4 and 10-14, each with a bright square that is its lesion."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for number in (0, 2, 4, 10, 12, 14):
        mask = np.zeros((64, 64), dtype=np.uint8)
        mask[20:40, 16:32] = 255
        image = rng.integers(0, 90, mask.shape).astype(np.uint8) + mask // 2
        Image.fromarray(image).save(root / "images" / f"{number:04d}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number:04d}.png")
    return root


def test_resumed_training_equals_an_uninterrupted_one(image_root: Path, tmp_path: Path) -> None:
    """Two steps in two goes give the weights of two steps at once, and the metrics file holds both steps."""
    at_once = train(RECIPE, image_root, tmp_path / "once", Budget(steps=2))
    halves = tmp_path / "halves"
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, image_root, halves, Budget(steps=2, save_every_steps=1), report=_interrupt)
    resumed = train(RECIPE, image_root, halves, Budget(steps=2))
    expected = load_checkpoint(at_once).network.state_dict()
    for key, tensor in load_checkpoint(resumed).network.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    lines = [json.loads(line) for line in (halves / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line][-1] == 2


def _interrupt(line: dict[str, object]) -> None:
    if line["step"] == 2:
        raise KeyboardInterrupt


def test_a_loss_that_is_not_finite_stops_the_training(
    image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN loss ends the training with a clear error, and nothing is saved over the last good state."""
    monkeypatch.setattr(loop, "bce_dice", lambda logits, mask: bce_dice(logits * float("nan"), mask))
    with pytest.raises(ModelError, match="step 0: the loss is nan"):
        train(RECIPE, image_root, tmp_path, Budget(steps=2))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_damaged_snapshot_is_named(image_root: Path, tmp_path: Path) -> None:
    """A training that can't be resumed says which file is at fault."""
    (tmp_path / "state.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=r"state\.pt can't be resumed"):
        train(RECIPE, image_root, tmp_path, Budget(steps=1))


@pytest.mark.parametrize(
    ("recipe", "budget", "words"),
    [
        (RECIPE, Budget(), "needs an end"),
        (replace(RECIPE, stages=(Stage(1.0, 40, 2, (1, 1)),)), Budget(steps=1), "multiple of 32"),
        (replace(RECIPE, stages=(Stage(0.5, 32, 2, (1, 1)),)), Budget(steps=1), r"expected 1\.0"),
    ],
)
def test_settings_that_can_not_work(
    recipe: Recipe, budget: Budget, words: str, image_root: Path, tmp_path: Path
) -> None:
    """What can't be trained is refused before any work."""
    with pytest.raises(SettingError, match=words):
        train(recipe, image_root, tmp_path, budget)


def test_scans_are_never_split(image_root: Path) -> None:
    """Held-out scans give their slices to validation alone."""
    split = read_source(replace(SOURCE, validation_scans=(1,)), image_root)
    assert [item.name for item in split.training] == ["0000.png", "0002.png", "0004.png"]
    assert {item.scan for item in split.validation} == {"images#1"}


def test_a_mask_of_another_size_is_refused(image_root: Path, tmp_path: Path) -> None:
    """An image and a mask that differ in size are refused by name."""
    for folder, side in (("images", 64), ("masks", 32)):
        (tmp_path / folder).mkdir()
        Image.new("L", (side, side)).save(tmp_path / folder / "0001.png")
    with pytest.raises(SettingError, match=r"0001\.png: image \(64, 64\), but its mask is \(32, 32\)"):
        read_source(SOURCE, tmp_path)


def test_reference_recipe_holds_scans_out() -> None:
    """The shipped recipe reads, and neither trains on P001 nor on the held-out lesion scans."""
    recipe = read_recipe(RECIPES / "reference.toml")
    assert not any("P001" in source.folder for source in recipe.sources)
    assert recipe.sources[0].validation_scans == (5, 7, 8)


@pytest.mark.parametrize("text", ["seed = ", "[[source]]\nkind = 'guess'\nfolder = 'x'\n", "speed = 3\n", ""])
def test_unusable_recipes(text: str, tmp_path: Path) -> None:
    """A recipe that is no TOML, names an unknown kind or key, or has no data is refused."""
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    with pytest.raises(SettingError):
        read_recipe(tmp_path / "recipe.toml")


def _chest() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    hu = np.full((128, 128), -1000.0, dtype=np.float32)
    hu[20:108, 10:118] = 40.0
    hu[35:95, 20:55] = hu[35:95, 70:105] = -850.0
    return hu


def test_opacities_lie_in_the_lungs_and_only_raise() -> None:
    """A synthetic opacity raises attenuation, marks lung only, and the same generator gives the same one."""
    hu = _chest()
    raised, mask = add_opacity(hu, np.random.default_rng(1))
    assert mask.any()
    assert not (mask & ~lungs(hu)).any()
    assert raised[mask].mean() > hu[mask].mean() + 50.0
    assert np.array_equal(add_opacity(hu, np.random.default_rng(1))[0], raised)


def test_no_lung_no_opacity() -> None:
    """A slice without lung comes back unchanged, with an empty mask."""
    hu = np.full((64, 64), 40.0, dtype=np.float32)
    raised, mask = add_opacity(hu, np.random.default_rng(1))
    assert np.array_equal(raised, hu)
    assert not mask.any()


@pytest.mark.parametrize("seed", range(8))
def test_augmented_views_stay_in_range(seed: int) -> None:
    """Whatever is drawn: images within 0..1, masks 0 or 1, the asked size, and repeatable."""
    item = TrainingSlice("s", "scan", _chest().astype(np.int16), np.zeros((128, 128), dtype=np.bool_), True)
    views = [augmented(item, 96, (0.6, 2.0), 1.0, np.random.default_rng(seed)) for _ in range(2)]
    image, mask = views[0]
    assert image.shape == mask.shape == (1, 96, 96)
    assert 0.0 <= float(image.min()) <= float(image.max()) <= 1.0
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert all(torch.equal(*pair) for pair in zip(*views, strict=True))


def test_plain_view_is_the_served_image() -> None:
    """Without augmentation a slice at its own size is the lung window, nothing else."""
    item = TrainingSlice("s", "scan", _chest().astype(np.int16), np.zeros((128, 128), dtype=np.bool_), True)
    image, _ = plain(item, 128)
    assert np.allclose(image[0].numpy(), np.clip((_chest() + 1350) / 1500, 0, 1), atol=1e-6)


def test_equalisation_spreads_a_dull_image() -> None:
    """Adaptive equalisation keeps the range 0..1 and widens the contrast of a dull image."""
    dull = 0.4 + 0.05 * np.random.default_rng(2).random((64, 64), dtype=np.float32)
    bright = equalise(dull, clip=4.0)
    assert bright.min() >= 0.0
    assert bright.max() <= 1.0
    assert bright.std() > 2 * dull.std()


def test_dice_of_masks() -> None:
    """Dice is 1 for equal and for two empty masks, 0 for disjoint ones, and 2/3 for a half."""
    empty, left = np.zeros((4, 4), dtype=np.bool_), np.zeros((4, 4), dtype=np.bool_)
    left[:, :2] = True
    half = left.copy()
    half[:, 1] = False
    assert [dice(empty, empty), dice(left, left), dice(left, ~left)] == [1.0, 1.0, 0.0]
    assert dice(half, left) == pytest.approx(2 / 3)


def test_calibration_takes_the_strictest_fit_rule() -> None:
    """The best threshold by dice wins; then the largest pixel rule that keeps both bounds."""
    overlap = np.zeros((20, len(THRESHOLDS)))
    overlap[:, 2] = 0.8
    positive = Scores(np.full(overlap.shape, 250), overlap)
    negative = Scores(np.full(overlap.shape, 30), np.zeros(overlap.shape))
    found = choose_calibration(positive, negative)
    assert (found.probability_threshold, found.min_lesion_pixels) == (THRESHOLDS[2], 240)


def test_calibration_needs_both_kinds() -> None:
    """Slices of one kind alone can't calibrate."""
    none = Scores(np.zeros((0, len(THRESHOLDS)), dtype=np.int64), np.zeros((0, len(THRESHOLDS))))
    with pytest.raises(SettingError, match="with and slices without"):
        choose_calibration(none, none)


def test_imagenet_weights_see_the_scaled_image(data_root: Path) -> None:
    """One grey channel in 0..1 gives what the original stem gives for three in -1..1, the border aside."""
    weights = data_root.parent / "weights" / "xception_imagenet.npz"
    if not weights.is_file():
        pytest.skip("the ImageNet weights are not beside the data")
    grey, colour = XceptionEncoder(1).eval(), XceptionEncoder(3).eval()
    for encoder in (grey, colour):
        load_imagenet(encoder, weights)
    with np.load(weights) as stored:
        kernel = torch.from_numpy(stored["block1_conv1/kernel"].astype(np.float32)).permute(3, 2, 0, 1)
        mean = torch.from_numpy(stored["block1_conv1_bn/moving_mean"])
    image = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        ours = grey.conv1(image) - grey.bn1.running_mean[:, None, None]
        theirs = torch.conv2d(2 * image.expand(1, 3, 64, 64) - 1, kernel, stride=2, padding=1) - mean[:, None, None]
        assert torch.allclose(ours[..., 1:, 1:], theirs[..., 1:, 1:], atol=1e-4)
        assert torch.allclose(grey(image)[0], colour(image.expand(1, 3, 64, 64))[0], atol=1e-3)


def test_a_file_without_imagenet_weights(tmp_path: Path) -> None:
    """A file that holds other arrays is refused by name."""
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"other\.npz"):
        load_imagenet(XceptionEncoder(1), tmp_path / "other.npz")


def test_series_are_read_head_to_feet(data_root: Path) -> None:
    """P001's slices come in the order of the radiologists' labels, whatever the files are called."""
    folder = data_root / "covid_ct_md"
    labels = json.loads((folder / "P001_slice_labels.json").read_text(encoding="utf-8"))
    assert list(read_series_hu(folder / "P001")) == [row["file"] for row in labels]
