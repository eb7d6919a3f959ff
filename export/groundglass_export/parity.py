"""Does an exported pair of graphs compute what the checkpoint computes in torch?

The reference is plain torch and numpy, written apart from the served graphs, so that an error there shows here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from groundglass.contract import (
    IMAGE_SIDE,
    LUNG_WINDOW_CENTRE_HU,
    LUNG_WINDOW_WIDTH_HU,
)
from groundglass.errors import ParityError
from groundglass_export.checkpoint import Checkpoint
from groundglass_export.engine import LOGITS, OnnxEngine, OnnxPreprocess, probability_of
from groundglass_export.graphs import grey_network


@dataclass(frozen=True, slots=True)
class ParityLimits:
    """What an export may differ by. Slice verdicts must be the same."""

    image_difference: float = 1e-5
    probability_difference: float = 1e-3
    mask_agreement: float = 0.999


@dataclass(frozen=True, slots=True)
class Parity:
    """How far an export is from torch, over ``slices`` slices.

    The differences are the largest of any pixel; ``mask_agreement`` is the share of pixels with the same verdict in the
    worst slice.
    """

    slices: int
    image_difference: float
    probability_difference: float
    mask_agreement: float
    verdicts_differing: int

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Answer:
    """One slice's image float32 (512, 512), probability float32 (512, 512), mask bool (512, 512), and verdict."""

    image: NDArray[np.float32]
    probability: NDArray[np.float32]
    mask: NDArray[np.bool_]
    pixels: int
    positive: bool


def check_parity(
    checkpoint: Checkpoint,
    preprocess: onnx.ModelProto,
    unet: onnx.ModelProto,
    slices_hu: Sequence[NDArray[np.int16]],
    limits: ParityLimits,
) -> Parity:
    """Run both, under ONNX Runtime and in torch FP32, over int16 (rows, cols) slices of any sizes, and compare.

    Raises ParityError, with the figures, when a limit is broken; also when the mask, the pixel count and the verdict
    of the export do not belong together.
    """
    served = _served_answers(preprocess, unet, slices_hu)
    expected = _torch_answers(checkpoint, slices_hu)
    parity = _compare(list(zip(served, expected, strict=True)))
    complaints = [
        f"{name} {found:.3g}, allowed {allowed:g}"
        for name, found, allowed, broken in (
            ("image difference", parity.image_difference, limits.image_difference, np.greater),
            ("probability difference", parity.probability_difference, limits.probability_difference, np.greater),
            ("mask agreement", parity.mask_agreement, limits.mask_agreement, np.less),
            ("slices with another verdict", parity.verdicts_differing, 0, np.greater),
        )
        if broken(found, allowed) or not np.isfinite(found)
    ]
    if complaints:
        raise ParityError(f"the exported graphs differ from torch over {parity.slices} slices: {'; '.join(complaints)}")
    return parity


def synthetic_slices(count: int = 4, seed: int = 5) -> list[NDArray[np.int16]]:
    """Chest-like slices, int16 HU, of several sizes: body, two lungs, opacities, noise, values beyond the window."""
    rng = np.random.default_rng(seed)
    sizes = ((512, 512), (256, 256), (512, 512), (400, 600))
    return [_chest(sizes[number % len(sizes)], rng) for number in range(count)]


def _chest(size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.int16]:
    y, x = np.meshgrid(*(np.linspace(-1.0, 1.0, length) for length in size), indexing="ij")
    hu = np.where(np.hypot(y / 0.7, x / 0.9) < 1.0, 40.0, -1000.0)
    for side in (-1.0, 1.0):
        lung = np.hypot(y / 0.5, (x - side * 0.42) / 0.33) < 1.0
        hu[lung] = -850.0
        centre = rng.uniform(-0.25, 0.25, size=2) + np.array([0.0, side * 0.42])
        hu += lung * 450.0 * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 0.01)
    hu += rng.normal(0.0, 25.0, size=size)
    hu[:4, :4] = (-32768, 32767, -2000, 3071)
    return np.asarray(np.rint(hu).clip(-32768, 32767), dtype=np.int16)


def _served_answers(
    preprocess: onnx.ModelProto, unet: onnx.ModelProto, slices_hu: Iterable[NDArray[np.int16]]
) -> Iterator[_Answer]:
    window, network = OnnxPreprocess(preprocess), OnnxEngine(unet)
    for hu in slices_hu:
        image = window.image(hu)
        served = network.answers(image[None])
        if served.probability is None:
            raise ParityError(f"the exported graph has no value called {LOGITS}: its probabilities can't be compared")
        answer = _Answer(
            image[0], served.probability[0], served.mask[0], int(served.pixels[0]), bool(served.positive[0])
        )
        if answer.pixels != int(answer.mask.sum()):
            raise ParityError(
                f"the exported graph counts {answer.pixels} lesion pixels in a mask of {answer.mask.sum()}"
            )
        yield answer


def _torch_answers(checkpoint: Checkpoint, slices_hu: Iterable[NDArray[np.int16]]) -> Iterator[_Answer]:
    network, calibration = grey_network(checkpoint), checkpoint.calibration
    floor_hu = LUNG_WINDOW_CENTRE_HU - LUNG_WINDOW_WIDTH_HU / 2
    for hu in slices_hu:
        windowed = np.clip((hu.astype(np.float32) - np.float32(floor_hu)) / np.float32(LUNG_WINDOW_WIDTH_HU), 0.0, 1.0)
        with torch.inference_mode():
            image = torch.nn.functional.interpolate(
                torch.from_numpy(windowed)[None, None], (IMAGE_SIDE, IMAGE_SIDE), mode="bilinear", align_corners=False
            )
            probability = probability_of(network(image)[0, 0].numpy())
        mask = probability >= calibration.probability_threshold
        pixels = int(mask.sum())
        yield _Answer(image[0, 0].numpy(), probability, mask, pixels, pixels >= calibration.min_lesion_pixels)


def _compare(pairs: Sequence[tuple[_Answer, _Answer]]) -> Parity:
    return Parity(
        slices=len(pairs),
        image_difference=max(float(np.abs(a.image - b.image).max()) for a, b in pairs),
        probability_difference=max(float(np.abs(a.probability - b.probability).max()) for a, b in pairs),
        mask_agreement=min(float((a.mask == b.mask).mean()) for a, b in pairs),
        verdicts_differing=sum(a.positive != b.positive for a, b in pairs),
    )
