"""A forward pass that rounds what an INT8 graph rounds, so that training finds weights which survive it.

Gradients pass as if nothing had been rounded (the straight-through estimate of Jacob et al., arXiv:1712.05877). What
``int8`` does beyond that, equalizing channels and correcting means, only makes its errors smaller than these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from groundglass_export.int8_stats import STEPS

WEIGHT_CODES = 90
"""The largest code of a filter's weights: between 127, and the 64 that two weights of equal size are left with where a
CPU adds their products in 16 bits.
"""

_LEAST_STEP = 1e-12


def forward_in_int8(network: nn.Module, image: Tensor) -> Tensor:
    """What ``network`` makes of ``image``, the weights and inputs of its convolutions rounded to 8 bits.

    Its first and its last convolution stay in float, as in the INT8 graph.
    """
    convolutions = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)][1:-1]
    weights = {f"{name}.weight": rounded_weight(module.weight) for name, module in convolutions}
    with _rounded_inputs(module for _, module in convolutions):
        return functional_call(network, weights, (image,))  # type: ignore[no-any-return]


def rounded_weight(weight: Tensor) -> Tensor:
    """Weights float (filters, channels, rows, cols), each filter rounded to :data:`WEIGHT_CODES` either way."""
    steps = weight.detach().abs().amax(dim=(1, 2, 3)).clamp(min=_LEAST_STEP) / WEIGHT_CODES
    zeros = torch.zeros(len(steps), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight, steps, zeros, 0, -WEIGHT_CODES, WEIGHT_CODES)


class _RoundedActivation(torch.autograd.Function):
    """Gradients pass whole: the steps span the range, so none would be cut off, and no mask has to be kept."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        dense = values.movedim(1, -1) if values.dim() == 4 else values  # aminmax copies channels_last otherwise
        least, largest = torch.aminmax(dense)
        least, largest = least.float().clamp(max=0.0), largest.float().clamp(min=0.0)
        step = ((largest - least) / STEPS).clamp(min=_LEAST_STEP)
        zero = (-least / step).round().to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(values, step, zero, 0, STEPS)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def rounded_activation(values: Tensor) -> Tensor:
    """Activations of any shape, rounded to :data:`STEPS` equal steps over their range, which takes in zero."""
    return cast("Tensor", _RoundedActivation.apply(values))  # type: ignore[no-untyped-call]


@contextmanager
def _rounded_inputs(convolutions: Iterable[nn.Module]) -> Iterator[None]:
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: (rounded_activation(inputs[0]),)) for module in convolutions
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
