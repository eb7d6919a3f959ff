"""What a bare engine is to the benchmark: a function that opens it, and then gives a run of any batch size.

All get the same images, float32 (n, 1, 512, 512), and give the served outputs: mask, lesion pixels, verdict.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from groundglass.contract import IMAGE
from groundglass_export.graph_types import one_line

Run = Callable[[], object]
"""Runs one batch: done when it returns on a CPU, enqueued when it returns on a GPU."""

Prepare = Callable[[int], Run]
"""From a batch size to its run."""


class Absent(Exception):
    """This engine can't run here; the message is the reason."""


@dataclass
class Models:
    """The files that were given, by their role, and the graphs made from them when an engine first needs them."""

    files: Mapping[str, Path]
    threads: int
    compile_mode: str
    largest_batch: int

    @cached_property
    def fp32_graph(self) -> onnx.ModelProto:
        """The FP32 ONNX graph: the file given, or the checkpoint's export."""
        if "fp32" in self.files:
            return load_graph(self.files["fp32"])
        from groundglass_export.onnx_export import unet_model

        return unet_model(self.loaded_checkpoint)

    @cached_property
    def fp16_graph(self) -> onnx.ModelProto:
        """The FP16 ONNX graph: the file given, or made from the FP32 one."""
        if "fp16" in self.files:
            return load_graph(self.files["fp16"])
        from groundglass_export.half import to_half

        return to_half(self.fp32_graph).model

    @cached_property
    def loaded_checkpoint(self) -> Any:
        """The network's weights."""
        if "checkpoint" not in self.files:
            raise Absent("no checkpoint was given (--checkpoint)")
        from groundglass_export.checkpoint import load_checkpoint

        return load_checkpoint(self.files["checkpoint"])

    @cached_property
    def stream(self) -> Any:
        """The stream of the GPU that all engines work on."""
        import torch

        return torch.cuda.Stream()


Contender = Callable[[Models], Prepare]
"""Opens an engine; raises Absent, or whatever its library raises, where it can't."""


def make_images(batch: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Noise in 0..1, the same every time: the networks' speed does not depend on what they see."""
    shape = (batch, *IMAGE.dims)
    return np.random.default_rng(batch).random(shape, dtype=np.float32)


def load_graph(path: Path) -> onnx.ModelProto:
    """Raises ModelError, naming the file, when it is no ONNX model."""
    from groundglass_export.engine import load_model

    return load_model(path)


def served_network(models: Models) -> Any:
    """The served graph as a torch module, FP32, on the CPU; the caller may change it."""
    from groundglass_export.graphs import ServedUnet, grey_network

    checkpoint = models.loaded_checkpoint
    return ServedUnet(copy.deepcopy(grey_network(checkpoint)), checkpoint.calibration).eval()


def open_contender(contender: Contender, models: Models) -> Prepare:
    """Raises Absent, with one line, for whatever keeps an engine from opening."""
    try:
        return contender(models)
    except Exception as error:  # the engines' libraries share no root of their errors
        raise Absent(one_line(error)) from error
