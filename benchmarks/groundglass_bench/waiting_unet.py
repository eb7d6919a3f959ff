"""A network that only waits, as a stage for Triton's Python backend: its file is copied into a repository's ``unet``.

It takes the time of a network without taking the processor: several of it run side by side on one core.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from groundglass import contract

SLICE_MS: Final = "slice_ms"
"""Parameter of the model's config: milliseconds for each slice."""

_FIXED: Final = {contract.MASK.name: np.uint8(0x0F), contract.LESION_PIXELS.name: np.int32(contract.IMAGE_SIDE**2 // 2)}


class TritonPythonModel:
    """Answers the same for every slice: half the pixels, positive."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read how long a slice takes."""
        import json

        parameters = json.loads(args["model_config"])["parameters"]
        self._slice_s = float(parameters[SLICE_MS]["string_value"]) / 1000.0

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Wait for the slices of each request in turn, and answer."""
        import triton_python_backend_utils as backend

        answers = []
        for request in requests:
            image = backend.get_input_tensor_by_name(request, contract.IMAGE.name)
            rows = image.shape()[0]
            time.sleep(rows * self._slice_s)
            answers.append(
                backend.InferenceResponse([backend.Tensor(name, value) for name, value in _answer(rows).items()])
            )
        return answers


def _answer(rows: int) -> dict[str, Any]:
    mask, pixels = contract.MASK, contract.LESION_PIXELS
    return {
        mask.name: np.full((rows, *mask.dims), _FIXED[mask.name]),
        pixels.name: np.full((rows, 1), _FIXED[pixels.name]),
        contract.SLICE_POSITIVE.name: np.ones((rows, 1), dtype=np.bool_),
    }
