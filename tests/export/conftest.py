"""Networks of the full size with random weights: what export and checkpoints are tried on."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

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
