"""Training on a few small slices: it repeats, resumes, stops with a reason, and reads its data by scan."""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from groundglass.errors import CheckpointError, ModelError, SettingError
from groundglass_export.calibration import Calibration
from groundglass_export.checkpoint import load_checkpoint
from groundglass_export.file_names import fold_of
from groundglass_export.network import LesionUnet, XceptionEncoder
from groundglass_export.training import loop
from groundglass_export.training.augment import augmented, equalise, plain
from groundglass_export.training.calibrate import (
    THRESHOLDS,
    Scores,
    calibrated,
    calibration_slices,
    choose_calibration,
)
from groundglass_export.training.imagenet import load_imagenet
from groundglass_export.training.loop import Budget, train
from groundglass_export.training.loss import bce, dice, slice_loss
from groundglass_export.training.opacity import add_opacity, lungs
from groundglass_export.training.recipe import Recipe, Source, Stage, read_recipe
from groundglass_export.training.slices import Split, TrainingSlice, read_series_hu, read_source

RECIPES = Path(__file__).parents[2] / "export" / "recipes"
SOURCE = Source("masked_images", "images", masks="masks", scan_starts=(0, 10))
RECIPE = Recipe((SOURCE,), (Stage(1.0, 32, 2, (0.8, 1.2)),))


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
    assert [load_checkpoint(path).training["steps"] for path in (at_once, resumed)] == [2, 2]
    lines = [json.loads(line) for line in (halves / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line][-1] == 2


def _interrupt(line: dict[str, object]) -> None:
    if line["step"] == 2:
        raise KeyboardInterrupt


def test_a_loss_that_is_not_finite_stops_the_training(
    image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN loss ends the training with a clear error, and nothing is saved over the last good state."""
    monkeypatch.setattr(loop, "bce", lambda logits, mask: bce(logits * float("nan"), mask))
    with pytest.raises(ModelError, match="step 0: the loss is nan"):
        train(RECIPE, image_root, tmp_path, Budget(steps=2))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_plateau_divides_the_rates(image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After more than ``patience`` epochs without a better validation the rates are divided by ten."""
    found = iter([0.5, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6])
    monkeypatch.setattr(loop, "validation_dice", lambda network, slices: next(found))
    source = replace(SOURCE, validation_scans=(1,))
    lines: list[dict[str, object]] = []
    train(replace(RECIPE, sources=(source,), epochs=6, patience=1), image_root, tmp_path, Budget(), report=lines.append)
    assert [line["divisor"] for line in lines if "divisor" in line] == [1.0, 1.0, 10.0, 10.0, 10.0, 100.0, 100.0]
    assert max(int(str(line["step"])) for line in lines) == 6 * 2


def test_a_resumed_training_knows_its_best(image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worse validation after a resume leaves the best checkpoint of before."""
    recipe = replace(RECIPE, sources=(replace(SOURCE, validation_scans=(1,)),))
    for steps, found in ((1, 0.5), (2, 0.4), (3, 0.6)):
        monkeypatch.setattr(loop, "validation_dice", lambda network, slices, found=found: found)
        best = load_checkpoint(train(recipe, image_root, tmp_path, Budget(steps=steps)))
        assert best.training["steps"] == (1 if steps < 3 else 3)
    assert load_checkpoint(tmp_path / "last.safetensors").training["steps"] == 3


def test_a_disk_that_is_full_keeps_the_last_good_checkpoint(image_root: Path, tmp_path: Path) -> None:
    """A save that does not fit ends the training by name of the file; the checkpoints of the save before it read."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    validated = 0

    def fill(line: dict[str, object]) -> None:
        nonlocal validated
        validated += "validation_dice" in line
        if validated == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))

    try:
        with pytest.raises(CheckpointError, match=r"state\.pt was not written: .*kept"):
            train(RECIPE, image_root, tmp_path, Budget(steps=3, save_every_steps=1), report=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path / "best.safetensors").training["steps"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.safetensors",
        "last.safetensors",
        "metrics.jsonl",
        "state.pt",
    ]
    resumed = train(RECIPE, image_root, tmp_path, Budget(steps=2))
    assert load_checkpoint(resumed).training["steps"] == 2


@pytest.fixture(scope="module")
def labelled_root(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Path:
    """The images and masks, and beside them single images of eight publications, two images each."""
    root = tmp_path_factory.mktemp("labelled")
    for folder in ("images", "masks"):
        (root / folder).symlink_to(image_root / folder)
    rng = np.random.default_rng(1)
    for folder in ("sick", "well"):
        (root / folder).mkdir()
        for number in range(16):
            grey = rng.integers(0, 255, (40 + number, 50), dtype=np.uint8)
            Image.fromarray(grey).save(root / folder / f"{folder}{number // 2}-p{number % 2}.png")
    return root


SINGLES = Source("labelled_images", positive="sick", negative="well", folds=4, validation_folds=(0,), test_folds=(1,))


def test_publications_are_never_split(labelled_root: Path) -> None:
    """Images of one publication share a part; the test's are in neither, and labels are all that positives know."""
    split = read_source(SINGLES, labelled_root)
    scans = [{item.scan for item in items} for items in (split.training, split.validation)]
    assert not scans[0] & scans[1]
    assert all(fold_of(scan, 4) in {2, 3} for scan in scans[0])
    assert {fold_of(scan, 4) for scan in scans[1]} == {0}
    assert all((item.mask is None) == item.name.startswith("sick") == item.positive for item in split.training)


def test_labels_alone_teach(labelled_root: Path, tmp_path: Path) -> None:
    """With a slice loss, images that have a label only change the network; held-out ones calibrate it."""
    recipe = replace(RECIPE, sources=(SINGLES,), slice_loss=1.0)
    lines: list[dict[str, Any]] = []
    best = train(recipe, labelled_root, tmp_path, Budget(steps=2), report=lines.append)
    assert all(line["loss"] > 0.0 for line in lines if "loss" in line)
    assert lines[-1]["calibration"] == load_checkpoint(best).calibration.as_dict()


def test_a_best_network_that_is_the_last_is_calibrated_once(
    labelled_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look at the calibration slices serves both checkpoints when they hold the same weights."""
    looks: list[int] = []

    def look(network: LesionUnet, sources: Sequence[Sequence[TrainingSlice]]) -> Calibration | None:
        looks.append(1)
        return calibrated(network, sources)

    monkeypatch.setattr(loop, "calibrated", look)
    best = train(replace(RECIPE, sources=(SINGLES,), slice_loss=1.0), labelled_root, tmp_path, Budget(steps=1))
    found = [load_checkpoint(path).calibration for path in (best, tmp_path / "last.safetensors")]
    assert len(looks) == 1
    assert found[0] == found[1]


def test_labels_alone_need_a_slice_loss(labelled_root: Path, tmp_path: Path) -> None:
    """Where every slice left has a label only, a recipe without slice loss is refused."""
    sick = replace(SINGLES, negative="sick")
    (tmp_path / "only").mkdir()
    recipe = replace(RECIPE, sources=(replace(sick, test_folds=(1, 2, 3)),))
    with pytest.raises(SettingError, match="no slice to train on"):
        train(recipe, labelled_root, tmp_path / "only", Budget(steps=1))


def test_slice_loss_pulls_the_strongest_pixels() -> None:
    """Only the strongest pixels of a slice have a gradient: up where the slice is positive, down where it is not."""
    logits = torch.linspace(-4, 4, 2 * 64 * 64).reshape(2, 1, 64, 64).requires_grad_()
    slice_loss(logits, torch.tensor([1.0, 0.0])).backward()
    assert logits.grad is not None
    moved = logits.grad.flatten(1)
    assert [int((row != 0).sum()) for row in moved] == [12, 12]
    assert bool((moved[0] <= 0).all() and (moved[1] >= 0).all())
    assert bool((moved[:, -12:] != 0).all())


def test_a_training_goes_on_from_a_checkpoint(image_root: Path, tmp_path: Path) -> None:
    """The first save of a training that starts from a checkpoint and moves nothing holds its weights."""
    first = train(RECIPE, image_root, tmp_path / "first", Budget(steps=1))
    still = replace(
        RECIPE, encoder_rate=0.0, decoder_rate=0.0, stages=(replace(RECIPE.stages[0], freeze_batch_norm=True),)
    )
    second = train(still, image_root, tmp_path / "second", Budget(steps=1), start=first)
    expected = load_checkpoint(first).network.state_dict()
    for key, tensor in load_checkpoint(second).network.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_a_device_that_is_not_there(image_root: Path, tmp_path: Path) -> None:
    """A device that torch does not have is refused by name, before any work."""
    with pytest.raises(SettingError, match="device cuda:99"):
        train(RECIPE, image_root, tmp_path / "out", Budget(steps=1), device="cuda:99")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("grey", "words"), [(0, "masks: no mask holds a lesion pixel"), (1, r"0001\.png: a mask with greys up to 1")]
)
def test_empty_masks_are_refused(grey: int, words: str, tmp_path: Path) -> None:
    """Masks without a lesion pixel are refused by folder; one of zeros and ones, which looks like that, by name."""
    for folder, value in (("images", 90), ("masks", grey)):
        (tmp_path / folder).mkdir()
        Image.new("L", (64, 64), value).save(tmp_path / folder / "0001.png")
    with pytest.raises(SettingError, match=words):
        read_source(SOURCE, tmp_path)


def test_a_damaged_snapshot_is_named(image_root: Path, tmp_path: Path) -> None:
    """A training that can't be resumed says which file is at fault."""
    (tmp_path / "state.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=r"state\.pt can't be resumed"):
        train(RECIPE, image_root, tmp_path, Budget(steps=1))


@pytest.mark.parametrize(
    ("recipe", "budget", "words"),
    [
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
    with pytest.raises(SettingError, match=r"0001\.png: a mask of 32 x 32 for an image of 64 x 64"):
        read_source(SOURCE, tmp_path)


def test_reference_recipe_holds_scans_out() -> None:
    """The shipped recipes with a network to show neither train on P001 nor on the held-out lesion scans."""
    for name in ("reference.toml", "images.toml"):
        recipe = read_recipe(RECIPES / name)
        assert not any("P001" in source.folder for source in recipe.sources)
        assert recipe.sources[0].validation_scans == (5, 7, 8)


def test_the_default_recipe_is_the_papers() -> None:
    """A recipe that names its data only is trained as Lokwani et al. trained."""
    recipe = read_recipe(RECIPES / "paper.toml")
    assert (recipe.loss, recipe.optimizer, recipe.encoder_rate, recipe.decoder_rate) == ("bce", "adam", 1e-4, 1e-4)
    assert (recipe.schedule, recipe.patience, recipe.epochs) == ("plateau", 4, 50)
    assert [(stage.side, stage.batch) for stage in recipe.stages] == [(512, 4)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loss = 'guess'", "loss = 'guess', expected one of bce, bce_dice"),
        ("opacity_probability = 0.3", "augment = false"),
        ("encoder_rate = nan", "encoder_rate = nan, expected 0 or more"),
        ("epochs = 0", "epochs = 0, expected at least 1"),
        ("ema_decay = 1.0", "ema_decay = 1, expected 0 or more and less than 1"),
        ("[[source]]\nkind = 'labelled_images'\npositive = 'x'", "source x: negative is missing"),
        ("[[source]]\nkind = 'masked_images'\nfolder = 'x'\nmasks = 'y'\ntest_scans = [3]", "test_scans names 3"),
    ],
)
def test_values_that_make_no_recipe(text: str, words: str, tmp_path: Path) -> None:
    """A value out of its range is refused by the name of its key, and of the file."""
    head = "" if "source" in text else "[[source]]\nkind = 'healthy_series'\nfolder = 'x'\n"
    path = tmp_path / "recipe.toml"
    path.write_text(f"{text}\n{head}", encoding="utf-8")
    with pytest.raises(SettingError, match=words) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


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
    """The best threshold by dice of outlined slices wins; then the largest pixel rule that keeps both bounds."""
    overlap = np.zeros((20, len(THRESHOLDS)))
    overlap[:, 2] = 0.8
    positive = Scores(np.full(overlap.shape, 250), overlap)
    labelled = Scores(np.full(overlap.shape, 300), np.eye(len(THRESHOLDS))[[4] * 20])
    negative = Scores(np.full(overlap.shape, 30), np.zeros(overlap.shape))
    found = choose_calibration([positive, labelled], [negative], outlined=1)
    assert (found.probability_threshold, found.min_lesion_pixels) == (THRESHOLDS[2], 240)


def test_calibration_needs_both_kinds() -> None:
    """Slices of one kind alone can't calibrate."""
    some = Scores(np.ones((1, len(THRESHOLDS)), dtype=np.int64), np.ones((1, len(THRESHOLDS))))
    with pytest.raises(SettingError, match="with and slices without"):
        choose_calibration([some], [], outlined=1)


def test_no_source_outvotes_another_in_calibration() -> None:
    """A hundred easy negative slices of one source don't hide ten hard ones of another."""
    ones = np.ones((10, len(THRESHOLDS)))
    positive = Scores(np.full(ones.shape, 400), ones)
    easy = Scores(np.zeros((100, len(THRESHOLDS)), dtype=np.int64), np.zeros((100, len(THRESHOLDS))))
    hard = Scores(np.full(ones.shape, 350), ones)
    assert choose_calibration([positive], [easy, hard], outlined=1).min_lesion_pixels == 400


def test_calibration_without_a_fit_rule_balances() -> None:
    """Where no rule keeps both bounds, sensitivity and specificity keep the highest common one, here 0.75."""

    def slices(*pixels: int) -> Scores:
        counts = np.repeat(np.array(pixels)[:, None], len(THRESHOLDS), axis=1)
        return Scores(counts, np.ones(counts.shape))

    found = choose_calibration([slices(50, 330, 500, 900)], [slices(10, 90, 250, 1400)], outlined=1)
    assert found.min_lesion_pixels == 320


def test_healthy_series_calibrate_too(image_root: Path) -> None:
    """Held-out slices and healthy series set the thresholds, other slices that were trained on do not."""
    split = read_source(replace(SOURCE, validation_scans=(1,)), image_root)
    clear = tuple(replace(item, mask=np.zeros(item.pixels.shape, dtype=np.bool_)) for item in split.training)
    healthy = Split(Source("healthy_series", "healthy"), clear, ())
    trained = replace(split, validation=())
    assert calibration_slices([split, healthy, trained]) == (split.validation, healthy.training)


def test_labelled_series_calibrate_by_their_slices_without_lesion(image_root: Path) -> None:
    """Of a labelled series that was trained on, slices without lesion set the thresholds, those with one do not."""
    split = read_source(SOURCE, image_root)
    clear, *rest = split.training
    clear = replace(clear, mask=np.zeros(clear.pixels.shape, dtype=np.bool_))
    series = Split(Source("labelled_series", "series", labels="labels.json"), (clear, *rest), ())
    assert calibration_slices([series]) == ((clear,),)


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
