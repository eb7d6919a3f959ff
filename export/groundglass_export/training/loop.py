"""The training itself: resumable, bounded by minutes or steps, the best and the last network kept.

The random numbers of a step depend on the seed and the step's number alone, so a resumed training continues exactly
as if it had not been interrupted (as long as it is bounded by steps; minutes depend on the machine).
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groundglass.errors import CheckpointError, ModelError, SettingError
from groundglass.publish import published
from groundglass_export.calibration import Calibration
from groundglass_export.checkpoint import Checkpoint, save_checkpoint
from groundglass_export.network import STRIDE, LesionUnet
from groundglass_export.training.augment import augmented, plain
from groundglass_export.training.imagenet import load_imagenet
from groundglass_export.training.loss import bce_dice, dice
from groundglass_export.training.recipe import Recipe, Stage
from groundglass_export.training.slices import Split, TrainingSlice, read_source

VALIDATION_SIDE = 512
"""Pixels: the size that is served."""

GRADIENT_NORM = 5.0


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop, whichever comes first, and how often to save (which is also when validation runs)."""

    minutes: float = math.inf
    steps: int | None = None
    save_every_minutes: float = 8.0
    save_every_steps: int | None = None

    def share(self, step: int, elapsed_minutes: float) -> float:
        """How much of the training is done, 0 to 1."""
        return min(1.0, max(elapsed_minutes / self.minutes, step / self.steps if self.steps else 0.0))


@dataclass(slots=True)
class Run:
    """The changing state of a training; :func:`_save` writes it, :func:`_resume` reads it."""

    network: LesionUnet
    average: LesionUnet
    optimizer: torch.optim.AdamW
    step: int = 0
    elapsed_minutes: float = 0.0
    best_dice: float = -1.0


def train(
    recipe: Recipe,
    data_root: Path,
    out: Path,
    budget: Budget,
    imagenet: Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
) -> Path:
    """Train, and return the path of the best checkpoint (``out/best.safetensors``; beside it ``last.safetensors``).

    Continues when ``out`` holds an interrupted training. Every step's and validation's figures are appended to
    ``out/metrics.jsonl`` and given to ``report``. Raises ModelError when the loss is not finite (the files of the
    last save stay), SettingError for unusable data, CheckpointError for unreadable weights.
    """
    _check(recipe, budget)
    splits = [read_source(source, data_root) for source in recipe.sources]
    held_out = [item for split in splits for item in split.validation][:: recipe.validation_stride]
    out.mkdir(parents=True, exist_ok=True)
    run = _start(recipe, out, imagenet)
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:

        def tell(line: dict[str, Any]) -> None:
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            report(line)

        _steps(run, recipe, splits, held_out, budget, out, tell)
    return out / "best.safetensors"


def _check(recipe: Recipe, budget: Budget) -> None:
    if budget.steps is None and math.isinf(budget.minutes):
        raise SettingError("a training needs an end: give minutes or steps")
    for stage in recipe.stages:
        if stage.side % STRIDE:
            raise SettingError(f"stage with side {stage.side}: expected a multiple of {STRIDE}")
    if recipe.stages[-1].until < 1.0:
        raise SettingError(f"the last stage ends at {recipe.stages[-1].until:g} of the training; expected 1.0")


def _start(recipe: Recipe, out: Path, imagenet: Path | None) -> Run:
    torch.manual_seed(recipe.seed)
    network = LesionUnet()
    if imagenet is not None:
        load_imagenet(network.encoder, imagenet)
    average = LesionUnet()
    average.load_state_dict(network.state_dict())
    for model in (network, average):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast here
    run = Run(network, average, _optimizer(network, recipe))
    snapshot = out / "state.pt"
    if snapshot.exists():
        _resume(run, snapshot)
    return run


def _optimizer(network: LesionUnet, recipe: Recipe) -> torch.optim.AdamW:
    rest = [*network.decoder.parameters(), *network.segmentation_head.parameters()]
    groups = [
        {"params": list(network.encoder.parameters()), "peak_rate": recipe.encoder_rate},
        {"params": rest, "peak_rate": recipe.decoder_rate},
    ]
    return torch.optim.AdamW(groups, lr=recipe.decoder_rate, weight_decay=recipe.weight_decay)


def _steps(
    run: Run,
    recipe: Recipe,
    splits: list[Split],
    held_out: list[TrainingSlice],
    budget: Budget,
    out: Path,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    clock = _Clock(run.elapsed_minutes)
    last_save = clock.minutes()
    while (share := budget.share(run.step, clock.minutes())) < 1.0:
        stage = next(stage for stage in recipe.stages if share < stage.until)
        loss = _step(run, stage, recipe, splits, share)
        run.elapsed_minutes = clock.minutes()
        tell({"step": run.step, "share": round(share, 5), "minutes": round(run.elapsed_minutes, 3), "loss": loss})
        due = budget.save_every_steps and run.step % budget.save_every_steps == 0
        if due or run.elapsed_minutes - last_save >= budget.save_every_minutes:
            _validate_and_save(run, recipe, held_out, out, tell)
            last_save = run.elapsed_minutes = clock.minutes()
    _validate_and_save(run, recipe, held_out, out, tell)


class _Clock:
    """Minutes of training, those before an interruption included."""

    def __init__(self, already_minutes: float) -> None:
        self._start = time.monotonic() - 60.0 * already_minutes

    def minutes(self) -> float:
        return (time.monotonic() - self._start) / 60.0


def _step(run: Run, stage: Stage, recipe: Recipe, splits: list[Split], share: float) -> float:
    image, mask = _batch(stage, recipe, splits, np.random.default_rng([recipe.seed, run.step]))
    rate = min(1.0, share / recipe.warmup_share if recipe.warmup_share else 1.0) * (1.0 - share)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_rate"] * max(rate, 0.01)
    run.network.train()
    if stage.freeze_batch_norm:
        _freeze_batch_norm(run.network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = run.network(image)
    loss = bce_dice(logits.float(), mask)
    if not math.isfinite(value := float(loss.detach())):
        raise ModelError(
            f"step {run.step}: the loss is {value}; the last save is kept. Lower the rates of the recipe and resume"
        )
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(run.network.parameters(), GRADIENT_NORM)
    run.optimizer.step()
    run.step += 1
    _update_average(run, recipe.ema_decay)
    return value


def _batch(stage: Stage, recipe: Recipe, splits: list[Split], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    usable = [split for split in splits if split.training]
    weights = np.array([split.source.weight for split in usable])
    views = []
    for number in rng.choice(len(usable), size=stage.batch, p=weights / weights.sum()):
        training = usable[number].training
        item = training[int(rng.integers(len(training)))]
        views.append(augmented(item, stage.side, stage.zoom, recipe.opacity_probability, rng))
    image = torch.stack([image for image, _ in views]).to(memory_format=torch.channels_last)
    return image, torch.stack([mask for _, mask in views])


def _freeze_batch_norm(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def _update_average(run: Run, decay: float) -> None:
    """A running mean of the weights; young runs forget faster, so that the untrained start leaves it soon."""
    keep = min(decay, (1 + run.step) / (10 + run.step))
    with torch.no_grad():
        for mean, value in zip(run.average.state_dict().values(), run.network.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1.0 - keep)
            else:
                mean.copy_(value)


def _validate_and_save(
    run: Run, recipe: Recipe, held_out: list[TrainingSlice], out: Path, tell: Callable[[dict[str, Any]], None]
) -> None:
    mean_dice = validation_dice(run.average, held_out)
    tell({"step": run.step, "validation_dice": mean_dice, "slices": len(held_out)})
    summary = {
        "steps": run.step,
        "minutes": round(run.elapsed_minutes, 1),
        "validation_dice": mean_dice,
        "seed": recipe.seed,
    }
    checkpoint = Checkpoint(run.average, Calibration(), summary)
    if mean_dice >= run.best_dice:
        run.best_dice = mean_dice
        save_checkpoint(out / "best.safetensors", checkpoint)
    save_checkpoint(out / "last.safetensors", checkpoint)
    _save(run, out / "state.pt")


def validation_dice(network: LesionUnet, slices: list[TrainingSlice]) -> float:
    """Mean dice over slices at the served size, pixel threshold 0.5; 0 when there is no slice."""
    network.eval()
    found = []
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for item in slices:
            image, mask = plain(item, VALIDATION_SIDE)
            logits = network(image[None].to(memory_format=torch.channels_last))[0]
            found.append(dice(logits.float().numpy() >= 0.0, mask.numpy() >= 0.5))
    return float(np.mean(found)) if found else 0.0


def _save(run: Run, path: Path) -> None:
    state = {
        "network": run.network.state_dict(),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "step": run.step,
        "elapsed_minutes": run.elapsed_minutes,
        "best_dice": run.best_dice,
    }
    try:
        with published(path) as beside:
            torch.save(state, beside)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(f"{path} was not written: {error}; the one before it is kept") from error


def _resume(run: Run, snapshot: Path) -> None:
    try:
        state = torch.load(snapshot, map_location="cpu", weights_only=True)
        run.network.load_state_dict(state["network"])
        run.average.load_state_dict(state["average"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.elapsed_minutes = state["step"], state["elapsed_minutes"]
        run.best_dice = state["best_dice"]
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{snapshot} can't be resumed: {error}; remove it to start anew") from error
