"""The two graphs that are served, as torch modules: what their ONNX exports are made from.

Heavy tensors never pass through Python in production, so windowing, threshold, pixel count and bit packing are here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from groundglass.contract import IMAGE_SIDE, LUNG_WINDOW_CENTRE_HU, LUNG_WINDOW_WIDTH_HU, MASK_ROW_BYTES
from groundglass_export.calibration import Calibration
from groundglass_export.checkpoint import Checkpoint
from groundglass_export.network import LesionUnet


class Preprocess(nn.Module):
    """HU int16 (n, rows, cols) -> IMAGE float32 (n, 1, 512, 512) in 0..1: lung window, then bilinear.

    The resize samples at pixel centres (half-pixel) without antialiasing, which is what both ONNX ``Resize`` and
    TensorRT compute: exact for 512x512, the mean of 2x2 for 1024x1024. Slices that are not square are stretched.
    """

    def forward(self, hu: Tensor) -> Tensor:
        """The window comes first, so that metal and air beyond it do not bleed into their neighbours."""
        floor_hu = LUNG_WINDOW_CENTRE_HU - LUNG_WINDOW_WIDTH_HU / 2
        windowed = ((hu.to(torch.float32) - floor_hu) / LUNG_WINDOW_WIDTH_HU).clamp(0.0, 1.0)
        return functional.interpolate(
            windowed.unsqueeze(1), size=(IMAGE_SIDE, IMAGE_SIDE), mode="bilinear", align_corners=False
        )


class HalfStored(nn.Module):
    """A network whose weights lie in FP16 wherever that loses nothing, and whose arithmetic stays FP32.

    In the ONNX file each large weight is an FP16 initializer followed by a Cast, so the file has half the size. ONNX
    Runtime folds the casts when it loads the model: measured, the outputs equal those of the FP32 file bit for bit,
    at its speed.
    """

    def __init__(self, network: LesionUnet) -> None:
        super().__init__()
        self._buffer_of = {key: key.replace(".", "_") for key in network.state_dict()}
        for key, tensor in network.state_dict().items():
            self.register_buffer(self._buffer_of[key], _smallest(tensor.detach()))
        # In a tuple, so that the FP32 weights are no part of this module and of its export.
        self._skeleton = (network,)

    def forward(self, image: Tensor) -> Tensor:
        """As :class:`LesionUnet`."""
        state = {key: self.get_buffer(name) for key, name in self._buffer_of.items()}
        full = {key: value.to(torch.float32) if value.is_floating_point() else value for key, value in state.items()}
        return torch.func.functional_call(self._skeleton[0], full, (image,))  # type: ignore[no-any-return]


class ServedUnet(nn.Module):
    """IMAGE -> MASK, LESION_PIXELS, SLICE_POSITIVE, and the logits that they were decided on.

    ``probability >= t`` is decided on the logit, ``logit >= log(t / (1 - t))``: the same answer without a sigmoid.
    """

    bit_values: Tensor

    def __init__(self, network: nn.Module, calibration: Calibration) -> None:
        super().__init__()
        self.network = network
        self.logit_threshold = logit(calibration.probability_threshold)
        self.min_lesion_pixels = calibration.min_lesion_pixels
        # The first pixel of eight is the highest bit, as numpy.packbits has it.
        self.register_buffer("bit_values", 2.0 ** torch.arange(7, -1, -1, dtype=torch.float32), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """uint8 (n, 512, 64), int32 (n, 1), bool (n, 1), float32 (n, 1, 512, 512)."""
        logits = self.network(image)
        lesion = logits >= self.logit_threshold
        bits = lesion.to(torch.float32).reshape(-1, IMAGE_SIDE, MASK_ROW_BYTES, 8)
        mask = (bits * self.bit_values).sum(dim=3).to(torch.uint8)
        # Counted in integers: a sum of 512x512 pixels leaves the range of FP16, should a converter lower it.
        pixels = lesion.to(torch.int32).sum(dim=(2, 3), dtype=torch.int32)
        return mask, pixels, pixels >= self.min_lesion_pixels, logits


def logit(probability: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(probability / (1.0 - probability))


def grey_network(checkpoint: Checkpoint) -> LesionUnet:
    """The checkpoint's network for one grey channel: a 3-channel stem is summed into one, as for three equal
    channels.
    """
    if checkpoint.in_channels == 1:
        return checkpoint.network
    network = LesionUnet(1)
    state = dict(checkpoint.network.state_dict())
    state["encoder.conv1.weight"] = state["encoder.conv1.weight"].sum(dim=1, keepdim=True)
    network.load_state_dict(state)
    return network.eval()


def served_unet(checkpoint: Checkpoint) -> ServedUnet:
    """The served graph of a checkpoint, in evaluation mode."""
    return ServedUnet(HalfStored(grey_network(checkpoint)), checkpoint.calibration).eval()


def _smallest(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.to(torch.float16)
    return half if torch.equal(half.to(torch.float32), tensor) else tensor
