"""A network of all the parts of the real one, small enough to be quantized in a moment."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

LOGITS = "LOGITS"
SIDE = 32
THRESHOLD = np.float32(0.4)


class _Layers:
    """Writes the little network: layers by name, their weights drawn at random."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(21)
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, NDArray[np.generic]] = {}

    def add(self, kind: str, inputs: list[str], output: str, **given: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], f"node_{output}", **given))
        return output

    def constant(self, name: str, values: object, dtype: type[np.generic] = np.float32) -> str:
        self.arrays[name] = np.asarray(values, dtype)
        return name

    def conv(self, source: str, output: str, shape: tuple[int, ...], group: int = 1) -> str:
        """Without a bias; the weights lie in FP16 and are cast, as the exporter writes them."""
        fan = int(np.prod(shape[1:]))
        self.constant(f"{output}_half", self.rng.normal(0, (2 / fan) ** 0.5, shape), np.float16)
        self.add("Cast", [f"{output}_half"], f"{output}_weight", to=TensorProto.FLOAT)
        pad = shape[2] // 2
        return self.add("Conv", [source, f"{output}_weight"], output, group=group, pads=[pad] * 4)

    def norm(self, source: str, channels: int) -> str:
        drawn = (
            self.rng.uniform(0.5, 1.5, channels) * 10.0 ** self.rng.uniform(-1.5, 1.5, channels),
            self.rng.normal(0, 0.1, channels),
            self.rng.normal(0, 0.1, channels),
            self.rng.uniform(0.5, 2, channels),
        )
        names = [self.constant(f"{source}_norm{place}", values) for place, values in enumerate(drawn)]
        return self.add("BatchNormalization", [source, *names], f"{source}_normed")

    def relu(self, source: str) -> str:
        return self.add("Relu", [source], f"{source}_relu")

    def separable(self, source: str, output: str, channels: int) -> str:
        depth = self.conv(source, f"{output}_depth", (channels, 1, 3, 3), group=channels)
        return self.norm(self.conv(depth, output, (channels, channels, 1, 1)), channels)


def little_unet() -> onnx.ModelProto:
    """What the real graph is made of, on images of 32x32: separable residual blocks, pool, doubling, skip, decision.

    Its channels differ in size by a thousand times.
    """
    net = _Layers()
    stem = net.relu(net.norm(net.conv("IMAGE", "stem", (8, 1, 3, 3)), 8))
    pooled = net.add(
        "MaxPool", [net.separable(stem, "down", 8)], "pooled", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4
    )
    side = net.add(
        "MaxPool", [net.norm(net.conv(stem, "side", (8, 8, 1, 1)), 8)], "halved", kernel_shape=[2, 2], strides=[2, 2]
    )
    total = net.add("Add", [pooled, side], "total_0")
    for place in (1, 2):
        branch = net.separable(net.relu(total), f"branch_{place}", 8)
        total = net.add("Add", [branch, total], f"total_{place}")
    net.constant("scales", [1, 1, 2, 2])
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    doubled = net.add("Resize", [total, "", "scales"], "doubled", **how)
    joined = net.add("Concat", [doubled, stem], "joined", axis=1)
    up = net.relu(net.norm(net.conv(joined, "up", (8, 16, 3, 3)), 8))
    net.conv(up, LOGITS, (1, 8, 3, 3))
    net.constant("threshold", THRESHOLD)
    net.add("GreaterOrEqual", [LOGITS, "threshold"], "lesion")
    net.add("Cast", ["lesion"], "counted", to=TensorProto.INT32)
    net.constant("axes", [2, 3], np.int64)
    net.add("ReduceSum", ["counted", "axes"], "LESION_PIXELS", keepdims=0)
    graph = helper.make_graph(
        net.nodes,
        "little",
        [helper.make_tensor_value_info("IMAGE", TensorProto.FLOAT, ["n", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("LESION_PIXELS", TensorProto.INT32, ["n", 1])],
        [numpy_helper.from_array(array, name) for name, array in net.arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def little_images(count: int = 6, seed: int = 4) -> list[NDArray[np.float32]]:
    """Blurred noise in 0..1."""
    noise = np.random.default_rng(seed).uniform(size=(count, 1, 1, SIDE + 4, SIDE + 4))
    rows = sum(noise[..., shift : shift + SIDE, :] for shift in range(5))
    return list((sum(rows[..., shift : shift + SIDE] for shift in range(5)) / 25).astype(np.float32))
