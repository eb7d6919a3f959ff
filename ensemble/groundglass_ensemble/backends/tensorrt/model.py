"""Stand-in for Triton's TensorRT backend, for servers that have none: it refuses to load a plan, and says why.

Triton takes this file only where ``libtriton_tensorrt.so`` is missing. It holds nothing of the project that ships it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


class TritonPythonModel:
    """Loads no plan: it names what is missing, in one line that Triton repeats in its log and in the failed load."""

    def initialize(self, args: dict[str, str]) -> None:
        """Raise RuntimeError: a plan can't run here."""
        missing = []
        if not Path("/dev/nvidiactl").exists():
            missing.append("an NVIDIA GPU")
        if importlib.util.find_spec("tensorrt") is None:
            missing.append("the TensorRT runtime (package tensorrt, extra 'tensorrt')")
        missing.append("Triton's own TensorRT backend (libtriton_tensorrt.so, part of NVIDIA's Triton container)")
        raise RuntimeError(
            f"model '{args['model_name']}' is a TensorRT plan, and this server lacks {', '.join(missing)}: serve its "
            "ONNX variant instead (--model-config-name=cpu), or serve the repository in the container"
        )
