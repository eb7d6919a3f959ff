"""Bare engines on the GPU: torch, ONNX Runtime's CUDA provider, TensorRT and TensorRT-RTX, all on one stream.

Images and outputs stay in the GPU's memory, so that the engine is measured and not the bus.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from contenders import Absent, Contender, Models, Prepare, Run, make_images, served_network
from groundglass.contract import IMAGE, UNET
from groundglass_export.plan import PlanSettings, build_plan, write_plan
from groundglass_export.plan_engine import PlanEngine
from groundglass_export.plan_inspection import require_precision


def torch_half(models: Models) -> Prepare:
    """Eager torch on the GPU, FP16, channels last."""
    return _torch_on_gpu(models, _half_network(models))


def torch_compiled(models: Models) -> Prepare:
    """torch.compile on the GPU, FP16, channels last; each batch size is compiled on its own."""
    return _torch_on_gpu(models, torch.compile(_half_network(models), mode=models.compile_mode, dynamic=False))


def onnx_cuda(models: Models) -> Prepare:
    """ONNX Runtime's CUDA provider, FP16 graph, on our stream."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise Absent(f"onnxruntime {onnxruntime.__version__} has no CUDA provider: install onnxruntime-gpu")
    cuda = {"device_id": "0", "user_compute_stream": str(models.stream.cuda_stream)}
    session = onnxruntime.InferenceSession(
        models.fp16_graph.SerializeToString(), providers=[("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
    )
    if session.get_providers()[0] != "CUDAExecutionProvider":  # a missing CUDA library is a warning there, no error
        raise Absent("onnxruntime did not load its CUDA provider, and would have run on the CPU")

    def prepare(batch: int) -> Run:
        images = torch.from_numpy(make_images(batch)).cuda()
        binding = session.io_binding()
        binding.bind_input(IMAGE.name, "cuda", 0, np.float32, tuple(images.shape), images.data_ptr())
        for tensor in UNET.outputs:
            binding.bind_output(tensor.name, "cuda", 0)
        # Waiting for the GPU after every run would leave it idle in between; the clock waits for our stream.
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def run(_kept: Any = images) -> None:  # the binding knows the images by their address alone
            session.run_with_iobinding(binding, options)

        return run

    return prepare


def tensorrt(models: Models) -> Prepare:
    """A TensorRT plan from the FP16 graph, built here, replayed as a CUDA graph."""
    return _plan(models, "tensorrt")


def tensorrt_rtx(models: Models) -> Prepare:
    """The same under TensorRT-RTX, which captures by itself."""
    return _plan(models, "tensorrt_rtx")


def _half_network(models: Models) -> Any:
    """Takes FP32 images as every engine does, and casts them."""
    served = served_network(models).cuda()
    served.network.to(torch.float16, memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True

    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.served = served

        def forward(self, images: Any) -> Any:
            return self.served(images.to(torch.float16, memory_format=torch.channels_last))

    return Half()


def _torch_on_gpu(models: Models, network: Any) -> Prepare:
    def prepare(batch: int) -> Run:
        images = torch.from_numpy(make_images(batch)).cuda()

        def run() -> None:
            with torch.inference_mode(), torch.cuda.stream(models.stream):
                network(images)

        return run

    return prepare


def _plan(models: Models, runtime: str) -> Prepare:
    largest = models.largest_batch
    plan = build_plan(models.fp16_graph, PlanSettings(runtime=runtime, batch=(1, largest, largest)))
    require_precision(plan.precision, "fp16")
    with tempfile.TemporaryDirectory(prefix="groundglass-benchmark-") as folder:
        engine = PlanEngine(write_plan(plan, Path(folder) / "model.plan"))

    def prepare(batch: int) -> Run:
        bound = engine.bind(batch)
        bound.inputs[IMAGE.name].copy_(torch.from_numpy(make_images(batch)))
        torch.cuda.synchronize()
        bound.enqueue(models.stream)  # the first run of a shape does work that can't be captured
        models.stream.synchronize()
        if runtime == "tensorrt_rtx":
            return lambda: bound.enqueue(models.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=models.stream):
            bound.enqueue(models.stream)

        def replay() -> None:
            with torch.cuda.stream(models.stream):
                graph.replay()

        return replay

    return prepare


ENGINES: dict[str, Contender] = {
    "torch-fp16": torch_half,
    "torch-compile": torch_compiled,
    "onnx-cuda": onnx_cuda,
    "tensorrt": tensorrt,
    "tensorrt-rtx": tensorrt_rtx,
}
"""By the name on the command line."""
