"""Bare engines on the CPU: ONNX Runtime in FP32 and INT8, eager torch; every one with the same number of threads."""

from __future__ import annotations

import onnx
import onnxruntime

from contenders import Absent, Contender, Models, Prepare, Run, load_graph, make_images, served_network
from groundglass.contract import IMAGE, UNET


def onnx_fp32(models: Models) -> Prepare:
    """ONNX Runtime on the CPU, FP32."""
    return _onnx_on_cpu(models.fp32_graph, models.threads)


def onnx_int8(models: Models) -> Prepare:
    """ONNX Runtime on the CPU, INT8."""
    if "int8" not in models.files:
        raise Absent("no INT8 graph was given (--int8)")
    return _onnx_on_cpu(load_graph(models.files["int8"]), models.threads)


def torch_fp32(models: Models) -> Prepare:
    """Eager torch on the CPU, FP32."""
    import torch

    network = served_network(models)
    torch.set_num_threads(models.threads)

    def prepare(batch: int) -> Run:
        images = torch.from_numpy(make_images(batch))
        return torch.inference_mode()(lambda: network(images))

    return prepare


def _onnx_on_cpu(model: onnx.ModelProto, threads: int) -> Prepare:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin after a run would take the cores from the next engine, whose turn it is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in UNET.outputs]

    def prepare(batch: int) -> Run:
        feed = {IMAGE.name: make_images(batch)}
        return lambda: session.run(names, feed)

    return prepare


ENGINES: dict[str, Contender] = {"onnx-fp32": onnx_fp32, "onnx-int8": onnx_int8, "torch-fp32": torch_fp32}
"""By the name on the command line."""
