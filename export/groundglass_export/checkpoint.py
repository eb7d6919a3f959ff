"""Checkpoints of the network: read from safetensors or from other people's pickles, written as FP16 safetensors.

What travels with the weights (thresholds, window, training summary) lies in the file's metadata as text, so that one
file is all that an export needs.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from groundglass.contract import LUNG_WINDOW_CENTRE_HU, LUNG_WINDOW_WIDTH_HU
from groundglass.errors import CheckpointError
from groundglass.publish import published
from groundglass_export.calibration import Calibration
from groundglass_export.network import LesionUnet

FORMAT = "1"
"""Of the metadata; a reader refuses what it does not know."""

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts bury the weights."""

_PREFIXES = ("module.", "model.", "_orig_mod.")
"""What DataParallel, Lightning and torch.compile put before every key."""

_KEYS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A network's weights (float32, on the CPU) and what was decided with them."""

    network: LesionUnet
    calibration: Calibration
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def in_channels(self) -> int:
        """1, or 3 for a network trained on grey images in three equal channels."""
        return self.network.encoder.conv1.in_channels


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write FP16 safetensors with its metadata; the file at ``path`` is replaced only once the new one is whole.

    A batch norm's variances beyond what FP16 holds stay in FP32.

    Raises CheckpointError when a weight is not finite in FP16, or when the file can't be written (a full disk).
    """
    tensors = {key: _half(key, tensor.cpu()) for key, tensor in checkpoint.network.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "calibration": json.dumps(checkpoint.calibration.as_dict(), sort_keys=True),
        "window_hu": json.dumps({"centre": LUNG_WINDOW_CENTRE_HU, "width": LUNG_WINDOW_WIDTH_HU}, sort_keys=True),
        "training": json.dumps(checkpoint.training, sort_keys=True),
    }
    try:
        with published(path) as beside:
            save_file(tensors, beside, metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} was not written: {error}; the file before it, if any, is kept") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """The network in evaluation mode, from ``.safetensors``, or from a ``.pt``/``.pth`` pickle of weights only.

    Raises CheckpointError naming the file: missing, corrupted, of another network (the first missing and unexpected
    keys are named), with weights that are not finite, or calibrated for another window than this version serves.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a .safetensors, .pt or .pth checkpoint")
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
    elif path.suffix in {".pt", ".pth", ".bin", ".ckpt"}:
        state, metadata = _read_pickle(path), {}
    else:
        raise CheckpointError(f"{path}: expected a .safetensors, .pt or .pth file")
    network = _network_of(path, {_bare(key): tensor for key, tensor in state.items()})
    return Checkpoint(network, _calibration_of(path, metadata), json.loads(metadata.get("training", "{}")))


def _half(key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    half = tensor.detach().to(torch.float16).contiguous()
    if not bool(torch.isfinite(half).all()):
        if key.endswith(".running_var") and bool(torch.isfinite(tensor).all()):
            return tensor.detach().clone()  # a variance may pass 65504; exports fold it into the weights in FP32
        raise CheckpointError(f"{key} holds values that FP16 can't: the largest is {float(tensor.abs().max()):g}")
    return half


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is corrupted or no safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # weights_only: a pickle can run code when it is read; this refuses everything but tensors and containers.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is corrupted, or holds more than weights: {reason}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: expected a mapping of names to tensors, bare or under {' / '.join(_WRAPPERS)}")
    return content


def _bare(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _network_of(path: Path, state: dict[str, Tensor]) -> LesionUnet:
    stem = state.get("encoder.conv1.weight")
    network = LesionUnet(3 if stem is not None and stem.ndim == 4 and stem.shape[1] == 3 else 1)
    _check_keys(path, network.state_dict(), state)
    broken = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(f"{path} holds weights that are not finite: {_some(broken)}; train or save it again")
    network.load_state_dict(state, strict=True)
    return network.eval()


def _check_keys(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    complaints = []
    if missing := sorted(expected.keys() - found.keys()):
        complaints.append(f"missing {_some(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        complaints.append(f"unexpected {_some(unexpected)}")
    reshaped = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    if reshaped:
        complaints.append(f"of another shape {_some(reshaped)}")
    if complaints:
        raise CheckpointError(f'{path} is not of Unet("xception", classes=1): {"; ".join(complaints)}')


def _calibration_of(path: Path, metadata: Mapping[str, str]) -> Calibration:
    if not metadata.get("calibration"):
        return Calibration()
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} has metadata of format {metadata.get('format')}; this version reads {FORMAT}")
    window = json.loads(metadata["window_hu"])
    if (window["centre"], window["width"]) != (LUNG_WINDOW_CENTRE_HU, LUNG_WINDOW_WIDTH_HU):
        raise CheckpointError(
            f"{path} was trained for the window {window['centre']:g}/{window['width']:g} HU; "
            f"{LUNG_WINDOW_CENTRE_HU:g}/{LUNG_WINDOW_WIDTH_HU:g} is served"
        )
    return Calibration(**json.loads(metadata["calibration"]))


def _some(names: list[str]) -> str:
    rest = len(names) - _KEYS_SHOWN
    return ", ".join(names[:_KEYS_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
