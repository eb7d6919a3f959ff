"""The training itself: resumable, bounded by minutes or steps, the best and the last network kept.

The random numbers of a step depend on the seed and the step's number alone, so a resumed training continues exactly
as if it had not been interrupted (as long as it is bounded by steps; minutes depend on the machine).
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groundglass.errors import CheckpointError, ModelError, SettingError
from groundglass.publish import published
from groundglass_export.calibration import Calibration
from groundglass_export.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from groundglass_export.network import STRIDE, LesionUnet
from groundglass_export.training.augment import augmented, plain
from groundglass_export.training.calibrate import calibrated, calibration_slices, validation_dice
from groundglass_export.training.imagenet import load_imagenet
from groundglass_export.training.loss import bce, bce_dice, logit_penalty, slice_loss
from groundglass_export.training.precision import mixed_precision
from groundglass_export.training.recipe import Recipe, Stage
from groundglass_export.training.rounding import forward_in_int8
from groundglass_export.training.slices import Split, TrainingSlice, read_source

BEST = "best.safetensors"
LAST = "last.safetensors"
STATE = "state.pt"

GRADIENT_NORM = 5.0
PLATEAU_DIVISOR = 10.0


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop before the recipe's epochs are over, and how often to save (which is also when validation runs).

    With the schedule ``plateau`` every epoch is validated and saved besides.
    """

    minutes: float = math.inf
    steps: int | None = None
    save_every_minutes: float = 8.0
    save_every_steps: int | None = None


@dataclass(slots=True)
class Run:
    """The changing state of a training; :func:`_save` writes it, :func:`_resume` reads it."""

    network: LesionUnet
    average: LesionUnet
    optimizer: torch.optim.Optimizer
    device: torch.device
    step: int = 0
    elapsed_minutes: float = 0.0
    best_dice: float = -1.0
    epochs_since_best: int = 0
    rate_divisor: float = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What does not change while training."""

    recipe: Recipe
    budget: Budget
    splits: tuple[Split, ...]
    held_out: tuple[TrainingSlice, ...]
    calibrating: tuple[Sequence[TrainingSlice], ...]
    epoch_steps: int

    def share(self, step: int, elapsed_minutes: float) -> float:
        """How much of the training is done, 0 to 1."""
        steps = self.budget.steps or self.recipe.epochs * self.epoch_steps
        return min(1.0, max(elapsed_minutes / self.budget.minutes, step / steps))


def train(
    recipe: Recipe,
    data_root: Path,
    out: Path,
    budget: Budget,
    imagenet: Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
    start: Path | None = None,
    device: str | None = None,
) -> Path:
    """Train, and return the path of the best checkpoint (``out/best.safetensors``; beside it ``last.safetensors``).

    Both checkpoints are calibrated at the end (see ``calibrate.calibration_slices``). The network starts from
    the checkpoint ``start``, or with an encoder from ``imagenet``, or at random. Continues when ``out`` holds an
    interrupted training. ``device`` is torch's, by default the GPU where there is one. Every step's and validation's
    figures are appended to ``out/metrics.jsonl`` and given to ``report``.

    Raises ModelError when the loss is not finite (the files of the last save stay), SettingError for unusable data or a
    device that is not there, CheckpointError for weights that can't be read or written.
    """
    plan = _plan(recipe, data_root, budget)
    run = _start(recipe, out, imagenet, start, _device(device))
    try:
        out.mkdir(parents=True, exist_ok=True)
        metrics = (out / "metrics.jsonl").open("a", encoding="utf-8")
    except OSError as error:
        raise SettingError(f"{out} can't be written: {error}") from error
    with metrics:

        def tell(line: dict[str, Any]) -> None:
            try:
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
            except OSError as error:
                raise CheckpointError(f"{metrics.name} was not written: {error}; the last save is kept") from error
            report(line)

        _steps(run, plan, out, tell)
        by_step: dict[Any, Calibration | None] = {}  # the best network is often the last one
        for name in (BEST, LAST):
            checkpoint = load_checkpoint(out / name)
            step = checkpoint.training["steps"]
            if step not in by_step:
                by_step[step] = calibrated(checkpoint.network.to(run.device), plan.calibrating)
            if (calibration := by_step[step]) is not None:
                tell({"step": run.step, "checkpoint": name, "calibration": calibration.as_dict()})
                save_checkpoint(out / name, replace(checkpoint, calibration=calibration))
    return out / BEST


def _plan(recipe: Recipe, data_root: Path, budget: Budget) -> Plan:
    _check(recipe)
    splits = [read_source(source, data_root) for source in recipe.sources]
    if not recipe.slice_loss:
        splits = [replace(split, training=_outlined(split.training)) for split in splits]
    usable = tuple(split for split in splits if split.training and split.source.weight)
    if not usable:
        raise SettingError(
            "no slice to train on: everything is held out, or has a label without a mask while slice_loss is 0"
        )
    slices = sum(len(split.training) for split in usable)
    return Plan(
        recipe=recipe,
        budget=budget,
        splits=usable,
        held_out=tuple(item for split in splits for item in _outlined(split.validation))[:: recipe.validation_stride],
        calibrating=calibration_slices(splits),
        epoch_steps=math.ceil(slices / recipe.stages[-1].batch),
    )


def _outlined(slices: tuple[TrainingSlice, ...]) -> tuple[TrainingSlice, ...]:
    return tuple(item for item in slices if item.mask is not None)


def _check(recipe: Recipe) -> None:
    for stage in recipe.stages:
        if stage.side % STRIDE:
            raise SettingError(f"stage with side {stage.side}: expected a multiple of {STRIDE}")
    if recipe.stages[-1].until < 1.0:
        raise SettingError(f"the last stage ends at {recipe.stages[-1].until:g} of the training; expected 1.0")


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"device {name}: {str(error).splitlines()[0]}") from error
    return device


def _start(recipe: Recipe, out: Path, imagenet: Path | None, start: Path | None, device: torch.device) -> Run:
    torch.manual_seed(recipe.seed)
    network = LesionUnet() if start is None else load_checkpoint(start).network
    if imagenet is not None:
        if start is not None:
            raise SettingError("a checkpoint to start from and ImageNet weights given: expected one of them")
        load_imagenet(network.encoder, imagenet)
    average = LesionUnet()
    average.load_state_dict(network.state_dict())
    for model in (network, average):
        model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on CPUs
    run = Run(network, average, _optimizer(network, recipe), device)
    if (out / STATE).exists():
        _resume(run, out / STATE)
        if (out / BEST).exists():  # written after the state, which knows of the best before it only
            run.best_dice = max(run.best_dice, float(load_checkpoint(out / BEST).training["validation_dice"]))
    return run


def _optimizer(network: LesionUnet, recipe: Recipe) -> torch.optim.Optimizer:
    rest = [*network.decoder.parameters(), *network.segmentation_head.parameters()]
    groups = [
        {"params": list(network.encoder.parameters()), "peak_rate": recipe.encoder_rate},
        {"params": rest, "peak_rate": recipe.decoder_rate},
    ]
    kinds: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[recipe.optimizer](groups, lr=recipe.decoder_rate, weight_decay=recipe.weight_decay, fused=True)


def _steps(run: Run, plan: Plan, out: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    recipe, budget = plan.recipe, plan.budget
    clock = _Clock(run.elapsed_minutes)
    last_save = clock.minutes()
    while (share := plan.share(run.step, clock.minutes())) < 1.0:
        stage = next(stage for stage in recipe.stages if share < stage.until)
        loss = _step(run, stage, plan, share)
        run.elapsed_minutes = clock.minutes()
        tell({"step": run.step, "share": round(share, 5), "minutes": round(run.elapsed_minutes, 3), "loss": loss})
        due = budget.save_every_steps and run.step % budget.save_every_steps == 0
        epoch_over = recipe.schedule == "plateau" and run.step % plan.epoch_steps == 0
        if due or epoch_over or run.elapsed_minutes - last_save >= budget.save_every_minutes:
            _validate_and_save(run, plan, out, tell, epoch_over=epoch_over)
            last_save = run.elapsed_minutes = clock.minutes()
    _validate_and_save(run, plan, out, tell)


class _Clock:
    """Minutes of training, those before an interruption included."""

    def __init__(self, already_minutes: float) -> None:
        self._start = time.monotonic() - 60.0 * already_minutes

    def minutes(self) -> float:
        return (time.monotonic() - self._start) / 60.0


def _step(run: Run, stage: Stage, plan: Plan, share: float) -> float:
    recipe = plan.recipe
    batch = _batch(stage, plan, np.random.default_rng([recipe.seed, run.step])).to(run.device)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_rate"] * _rate(run, recipe, share)
    run.network.train()
    if stage.freeze_batch_norm:
        _freeze_batch_norm(run.network)
    with mixed_precision(run.device):
        logits = forward_in_int8(run.network, batch.image) if stage.int8 else run.network(batch.image)
    loss = _loss(logits.float(), batch, recipe)
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


def _rate(run: Run, recipe: Recipe, share: float) -> float:
    if recipe.schedule == "plateau":
        return 1.0 / run.rate_divisor
    warmup = min(1.0, share / recipe.warmup_share) if recipe.warmup_share else 1.0
    return max(warmup * (1.0 - share), 0.01)


@dataclass(frozen=True, slots=True)
class Batch:
    """Views: image and mask float32 (n, 1, side, side); ``outlined`` and ``positive`` bool (n,)."""

    image: Tensor
    mask: Tensor
    outlined: Tensor
    positive: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(tensor.to(device) for tensor in (self.image, self.mask, self.outlined, self.positive)))


def _batch(stage: Stage, plan: Plan, rng: np.random.Generator) -> Batch:
    weights = np.array([split.source.weight for split in plan.splits])
    items, views = [], []
    for number in rng.choice(len(plan.splits), size=stage.batch, p=weights / weights.sum()):
        training = plan.splits[number].training
        item = training[int(rng.integers(len(training)))]
        items.append(item)
        if plan.recipe.augment:
            views.append(augmented(item, stage.side, stage.zoom, plan.recipe.opacity_probability, rng))
        else:
            views.append(plain(item, stage.side))
    mask = torch.stack([mask for _, mask in views])
    outlined = torch.tensor([item.mask is not None for item in items])
    return Batch(
        image=torch.stack([image for image, _ in views]).to(memory_format=torch.channels_last),
        mask=mask,
        outlined=outlined,
        positive=mask.flatten(1).any(dim=1) | ~outlined,
    )


def _loss(logits: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """The loss of pixels over outlined slices, and that of slices where no outline says more than the label."""
    of_pixels = {"bce": bce, "bce_dice": bce_dice}[recipe.loss]
    total = (
        of_pixels(logits[batch.outlined], batch.mask[batch.outlined]) if batch.outlined.any() else logits.sum() * 0.0
    )
    judged = ~batch.outlined | ~batch.positive
    if recipe.slice_loss and judged.any():
        total = total + recipe.slice_loss * slice_loss(logits[judged], batch.positive[judged].float())
    if recipe.logit_bound:
        total = total + logit_penalty(logits, recipe.logit_bound)
    return total


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
    run: Run, plan: Plan, out: Path, tell: Callable[[dict[str, Any]], None], *, epoch_over: bool = False
) -> None:
    mean_dice = validation_dice(run.average, plan.held_out)
    better = mean_dice > run.best_dice or not plan.held_out
    if epoch_over:
        _decay_on_plateau(run, plan.recipe, better=better)
    tell({"step": run.step, "validation_dice": mean_dice, "slices": len(plan.held_out), "divisor": run.rate_divisor})
    summary = {
        "steps": run.step,
        "minutes": round(run.elapsed_minutes, 1),
        "validation_dice": mean_dice,
        "seed": plan.recipe.seed,
    }
    checkpoint = Checkpoint(run.average, Calibration(), summary)
    _save(run, out / STATE)  # first: whatever happens to a checkpoint, the training goes on from here
    if better:
        run.best_dice = mean_dice
        save_checkpoint(out / BEST, checkpoint)
    save_checkpoint(out / LAST, checkpoint)


def _decay_on_plateau(run: Run, recipe: Recipe, *, better: bool) -> None:
    run.epochs_since_best = 0 if better else run.epochs_since_best + 1
    if run.epochs_since_best > recipe.patience:
        run.rate_divisor, run.epochs_since_best = run.rate_divisor * PLATEAU_DIVISOR, 0


def _save(run: Run, path: Path) -> None:
    state = {
        "network": run.network.state_dict(),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "step": run.step,
        "elapsed_minutes": run.elapsed_minutes,
        "best_dice": run.best_dice,
        "epochs_since_best": run.epochs_since_best,
        "rate_divisor": run.rate_divisor,
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
        run.best_dice, run.rate_divisor = state["best_dice"], state["rate_divisor"]
        run.epochs_since_best = state["epochs_since_best"]
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{snapshot} can't be resumed: {error}; remove it to start anew") from error
