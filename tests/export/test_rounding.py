"""Training for INT8: what is rounded, that gradients pass, and that it ends with a network that survives rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from groundglass_export.int8_stats import STEPS
from groundglass_export.training.loop import Budget, train
from groundglass_export.training.loss import LOGIT_PENALTY, logit_penalty
from groundglass_export.training.precision import mixed_precision
from groundglass_export.training.recipe import Recipe, Source, Stage
from groundglass_export.training.rounding import (
    WEIGHT_CODES,
    forward_in_int8,
    rounded_activation,
    rounded_weight,
)


def _network(channels: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, 1, 1)
    )


def test_activations_have_256_values_and_keep_zero() -> None:
    """Rounded activations lie on a grid of 255 steps over their range, about half a step off; zero stays zero."""
    values = torch.cat([torch.zeros(1), torch.linspace(-1.3, 2.2, 5000)])
    rounded = rounded_activation(values)
    step = 3.5 / STEPS
    assert len(rounded.unique()) <= STEPS + 1
    assert rounded[0] == 0.0
    assert float((rounded - values).abs().max()) <= step * 0.76  # half a step, and the zero point's own rounding


@pytest.mark.parametrize("values", [torch.zeros(8), torch.full((8,), 3.0), torch.full((8,), -3.0)])
def test_activations_without_a_spread(values: torch.Tensor) -> None:
    """Values that are all alike survive; nothing divides by a range of zero."""
    assert torch.allclose(rounded_activation(values), values, atol=0.02)


def test_weights_are_rounded_filter_by_filter() -> None:
    """Each filter has its own step: a small one is not lost beside a large one."""
    weight = torch.stack([torch.linspace(-1.0, 1.0, 9), torch.linspace(-1e-3, 1e-3, 9)]).view(2, 1, 3, 3)
    error = (rounded_weight(weight) - weight).abs().amax(dim=(1, 2, 3))
    assert error[0] <= 0.5 / WEIGHT_CODES + 1e-6
    assert error[1] <= 0.5e-3 / WEIGHT_CODES + 1e-9


def test_gradients_pass_through_the_rounding() -> None:
    """Every parameter of a rounded forward pass gets a gradient, and the module computes in float again afterwards."""
    network, image = _network(), torch.rand(1, 1, 8, 8)
    plain = network(image)
    rounded = forward_in_int8(network, image)
    assert 0.0 < float((rounded - plain).abs().max().detach()) < 0.05
    rounded.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    assert torch.equal(network(image), plain)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5)])
def test_the_gradient_of_a_rounded_activation_is_whole(shape: tuple[int, ...]) -> None:
    """The least and the largest value have theirs too, however the zero point was rounded; layout doesn't matter."""
    values = torch.linspace(-0.37, 1.61, torch.Size(shape).numel()).view(shape)
    if values.dim() == 4:
        assert torch.equal(
            rounded_activation(values.contiguous(memory_format=torch.channels_last)), rounded_activation(values)
        )
    values.requires_grad_()
    weight = torch.rand(shape)
    (rounded_activation(values) * weight).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weight)


def test_the_first_and_the_last_convolution_stay_in_float() -> None:
    """As in the INT8 graph: with nothing between them, nothing is rounded."""
    torch.manual_seed(0)
    network, image = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 1, 1)), torch.rand(1, 1, 8, 8)
    assert torch.equal(forward_in_int8(network, image), network(image))


def test_training_for_int8_brings_the_rounded_output_closer() -> None:
    """A network fitted through the rounding fits its target better, once rounded, than one fitted without."""
    image = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    target = (image > 0.6).float()
    losses = {}
    for rounding in (False, True):
        network = _network(8)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        with torch.no_grad():
            network[2].weight[:, 0] *= 300.0  # one loud channel spends the eight bits of the rest
        for _ in range(150):
            logits = forward_in_int8(network, image) if rounding else network(image)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            rounded = forward_in_int8(network, image)
        losses[rounding] = float(nn.functional.binary_cross_entropy_with_logits(rounded, target))
    assert losses[True] < losses[False]


def test_a_stage_trains_for_int8(image_root: Path, tmp_path: Path) -> None:
    """A stage with ``int8`` judges the rounded output: the same first step has another loss than in float."""
    source = Source("masked_images", "images", masks="masks", scan_starts=(0, 10))
    losses = []
    for int8 in (False, True):
        lines: list[dict[str, Any]] = []
        recipe = Recipe((source,), (Stage(1.0, 32, 2, int8=int8),), logit_bound=8.0)
        train(recipe, image_root, tmp_path / str(int8), Budget(steps=1), report=lines.append)
        losses.append(lines[0]["loss"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_logits_beyond_the_bound_cost() -> None:
    """Within the bound nothing; beyond it the mean square of the excess, either way."""
    assert float(logit_penalty(torch.tensor([-8.0, 3.0, 8.0]), 8.0)) == 0.0
    assert float(logit_penalty(torch.tensor([-10.0, 11.0]), 8.0)) == pytest.approx(LOGIT_PENALTY * (4.0 + 9.0) / 2)


def test_precision_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 where the CPU multiplies in it, float32 where it would be emulated."""
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx2": True, "avx512_bf16": native})
        with mixed_precision(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if native else torch.float32)
