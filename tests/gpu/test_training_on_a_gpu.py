"""Training on a GPU: the loss of a first step is the CPU's, and what is saved reads anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from groundglass_export.checkpoint import load_checkpoint
from groundglass_export.training.loop import Budget, train
from groundglass_export.training.recipe import Recipe, Source, Stage

pytestmark = pytest.mark.gpu


def test_a_gpu_trains_as_a_cpu_does(tmp_path: Path) -> None:
    """The first step's loss is the CPU's within bf16, a second run resumes, and the checkpoint loads on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU, or a torch without CUDA")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[20:40, 16:32] = 255
    for folder, pixels in (("images", mask // 2 + 60), ("masks", mask)):
        (tmp_path / folder).mkdir()
        for number in range(4):
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    recipe = Recipe((Source("masked_images", "images", masks="masks"),), (Stage(1.0, 64, 4),))
    lines: dict[str, list[dict[str, Any]]] = {"cpu": [], "cuda": []}
    for device, seen in lines.items():
        train(recipe, tmp_path, tmp_path / device, Budget(steps=1), report=seen.append, device=device)
    losses = [seen[0]["loss"] for seen in lines.values()]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    best = train(recipe, tmp_path, tmp_path / "cuda", Budget(steps=2), device="cuda")
    assert load_checkpoint(best).training["steps"] == 2
