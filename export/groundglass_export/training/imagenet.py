"""ImageNet weights for the encoder, from the Keras Xception (Chollet, arXiv:1610.02357) kept as an npz file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from groundglass.errors import CheckpointError
from groundglass_export.network import XceptionEncoder

_KERAS_BN = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}

KERAS_BN_EPSILON = 1e-3
"""Ours is PyTorch's 1e-5, as the checkpoints of segmentation_models_pytorch expect; the variance takes up the
difference.
"""

_RESIDUAL_BLOCKS = (1, 2, 3, 12)
"""Our blocks with a residual convolution; Keras numbers those convolutions 0 to 3, and the blocks one higher."""


def load_imagenet(encoder: XceptionEncoder, weights: Path) -> None:
    """Fill the encoder in place. Raises CheckpointError when the file is unreadable or lacks an array."""
    try:
        with np.load(weights) as stored:
            arrays = {name: stored[name] for name in stored.files}
        state = {key: torch.from_numpy(value) for key, value in _encoder_state(arrays, encoder).items()}
        state |= {key: value for key, value in encoder.state_dict().items() if key.endswith("num_batches_tracked")}
        encoder.load_state_dict(state, strict=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{weights} holds no Xception ImageNet weights: {error}") from error


def _encoder_state(arrays: Mapping[str, NDArray[Any]], encoder: XceptionEncoder) -> dict[str, NDArray[np.float32]]:
    state: dict[str, NDArray[np.float32]] = {}
    for number in (1, 2):
        state[f"conv{number}.weight"] = _kernel(arrays[f"block1_conv{number}/kernel"])
        state |= _batch_norm(arrays, f"block1_conv{number}_bn", f"bn{number}")
    for number in range(1, 13):
        state |= _block(arrays, encoder, number)
    for number, ours in ((1, 3), (2, 4)):
        state |= _separable(arrays, f"block14_sepconv{number}", f"conv{ours}")
        state |= _batch_norm(arrays, f"block14_sepconv{number}_bn", f"bn{ours}")
    _fold_input_scale(state, encoder.conv1.in_channels)
    return state


def _block(arrays: Mapping[str, NDArray[Any]], encoder: XceptionEncoder, number: int) -> dict[str, NDArray[np.float32]]:
    state: dict[str, NDArray[np.float32]] = {}
    layers = encoder.get_submodule(f"block{number}.rep")
    separables = [name for name, layer in layers.named_children() if type(layer).__name__ == "SeparableConv2d"]
    for position, name in enumerate(separables, start=1):
        keras = f"block{number + 1}_sepconv{position}"
        state |= _separable(arrays, keras, f"block{number}.rep.{name}")
        state |= _batch_norm(arrays, f"{keras}_bn", f"block{number}.rep.{int(name) + 1}")
    if number in _RESIDUAL_BLOCKS:
        index = _RESIDUAL_BLOCKS.index(number)
        suffix = f"_{index}" if index else ""
        state[f"block{number}.skip.weight"] = _kernel(arrays[f"conv2d{suffix}/kernel"])
        state |= _batch_norm(arrays, f"batch_normalization{suffix}", f"block{number}.skipbn")
    return state


def _separable(arrays: Mapping[str, NDArray[Any]], keras: str, ours: str) -> dict[str, NDArray[np.float32]]:
    depthwise = arrays[f"{keras}/depthwise_kernel"].astype(np.float32).transpose(2, 3, 0, 1)  # (channels, 1, h, w)
    return {
        f"{ours}.conv1.weight": np.ascontiguousarray(depthwise),
        f"{ours}.pointwise.weight": _kernel(arrays[f"{keras}/pointwise_kernel"]),
    }


def _kernel(kernel: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(kernel.astype(np.float32).transpose(3, 2, 0, 1))  # h, w, in, out -> out, in, h, w


def _batch_norm(arrays: Mapping[str, NDArray[Any]], keras: str, ours: str) -> dict[str, NDArray[np.float32]]:
    state = {f"{ours}.{name}": arrays[f"{keras}/{theirs}"].astype(np.float32) for theirs, name in _KERAS_BN.items()}
    state[f"{ours}.running_var"] = state[f"{ours}.running_var"] + np.float32(KERAS_BN_EPSILON - 1e-5)
    return state


def _fold_input_scale(state: dict[str, NDArray[np.float32]], in_channels: int) -> None:
    """Let the first layer take grey images in 0..1 though it was trained on three channels in -1..1.

    conv(2x - 1) = 2 conv(x) - sum(kernel): the factor goes into the kernel, the constant into the mean that the batch
    norm subtracts. It is exact but for the one-pixel border, where padding now means black and not mid-grey.
    """
    kernel = state["conv1.weight"]
    state["bn1.running_mean"] = state["bn1.running_mean"] + kernel.sum(axis=(1, 2, 3))
    state["conv1.weight"] = 2.0 * (kernel.sum(axis=1, keepdims=True) if in_channels == 1 else kernel)
