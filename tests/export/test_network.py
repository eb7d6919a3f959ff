"""The network's names and shapes are those of segmentation_models_pytorch 0.6.0, taken down from that library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from groundglass_export.network import LesionUnet

GOLDEN = json.loads((Path(__file__).parent / "golden_state_keys.json").read_text(encoding="utf-8"))
STEM = "encoder.conv1.weight"


@pytest.mark.parametrize("channels", [1, 3])
def test_golden_state_loads_strictly(channels: int) -> None:
    """A state with the golden keys and shapes loads with strict=True, with a 1- and with a 3-channel stem."""
    shapes = GOLDEN | {STEM: [32, channels, 3, 3]}
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    LesionUnet(channels).load_state_dict(state, strict=True)


def test_golden_order_is_ours() -> None:
    """The keys come in the library's order, so that optimisers' states by position fit too."""
    assert list(LesionUnet().state_dict()) == list(GOLDEN)


def test_parameter_count() -> None:
    """The network has the paper's size: 28.8 million parameters."""
    assert sum(parameter.numel() for parameter in LesionUnet().parameters()) == 28_768_825


def test_output_has_the_size_of_the_input() -> None:
    """One logit a pixel, also for images that are not square."""
    with torch.inference_mode():
        assert LesionUnet().eval()(torch.rand(1, 1, 64, 96)).shape == (1, 1, 64, 96)
