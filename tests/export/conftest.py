"""Networks of the full size with random weights, and a few small images to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from groundglass_export.calibration import Calibration
from groundglass_export.checkpoint import Checkpoint, save_checkpoint
from groundglass_export.graphs import Preprocess
from groundglass_export.half import HalfModel, to_half
from groundglass_export.network import LesionUnet
from groundglass_export.parity import synthetic_slices

CALIBRATION = Calibration(probability_threshold=0.5001, min_lesion_pixels=300)


@pytest.fixture(scope="session")
def random_checkpoint() -> Checkpoint:
    """A network whose logits lie on both sides of the threshold."""
    torch.manual_seed(3)
    network = LesionUnet().eval()
    with torch.no_grad():
        network.segmentation_head[0].weight.mul_(30.0)
        hu = torch.from_numpy(synthetic_slices(1, seed=11)[0])[None]
        network.segmentation_head[0].bias.sub_(network(Preprocess()(hu)).median())
    return Checkpoint(network, CALIBRATION, {"steps": 0})


@pytest.fixture(scope="session")
def checkpoint_file(random_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network on disk."""
    path = tmp_path_factory.mktemp("checkpoint") / "random.safetensors"
    save_checkpoint(path, random_checkpoint)
    return path


@pytest.fixture(scope="session")
def shipped_unet(fp32_repository: Path) -> onnx.ModelProto:
    """The shipped checkpoint's ``unet`` in FP32."""
    return onnx.load(fp32_repository / "unet" / "1" / "model.onnx")


@pytest.fixture(scope="session")
def half_unet(shipped_unet: onnx.ModelProto) -> HalfModel:
    """The same in FP16."""
    return to_half(shipped_unet)


@pytest.fixture(scope="session")
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
