"""The probe network with a convolution and with logits, as the real one has: what engines and the gate are tried on.

``LOGITS`` is the mean of 3x3 pixels of IMAGE, times a gain, so that a pixel is lesion where that mean reaches 0.9.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import probe_network

PROBABILITY_THRESHOLD = 0.6
MIN_LESION_PIXELS = 64
GAIN = 40.0
LESION_IMAGE = 0.9  # 0 HU
_LOGIT = math.log(PROBABILITY_THRESHOLD / (1 - PROBABILITY_THRESHOLD))


def unet() -> onnx.ModelProto:
    """IMAGE -> convolution -> LOGITS -> the served outputs, decided at a probability of 0.6 and by 64 pixels."""
    model = probe_network.unet(MIN_LESION_PIXELS)
    graph = model.graph
    compared = graph.node[0]
    compared.input[0] = "LOGITS"
    graph.node.insert(0, helper.make_node("Conv", ["IMAGE", "weight", "bias"], ["LOGITS"], pads=[1, 1, 1, 1]))
    set_constant(model, "threshold", np.float32(_LOGIT))
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.full((1, 1, 3, 3), GAIN / 9, np.float32), "weight"),
            numpy_helper.from_array(np.array([_LOGIT - GAIN * LESION_IMAGE], np.float32), "bias"),
        ]
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def deep_unet(convolutions: int = 12) -> onnx.ModelProto:
    """The same answers through more convolutions: each hands its image on. Most layers of a plan are convolutions."""
    model = unet()
    kernel = np.zeros((1, 1, 3, 3), np.float32)
    kernel[0, 0, 1, 1] = 1.0
    chain = ["IMAGE", *(f"image_{place}" for place in range(convolutions))]
    for place, (before, after) in enumerate(itertools.pairwise(chain)):
        model.graph.initializer.append(numpy_helper.from_array(kernel, f"identity_{place}"))
        model.graph.node.insert(
            place, helper.make_node("Conv", [before, f"identity_{place}"], [after], f"identity_{place}", pads=[1] * 4)
        )
    model.graph.node[convolutions].input[0] = chain[-1]
    onnx.checker.check_model(model, full_check=True)
    return model


def logits(image: NDArray[np.float32]) -> NDArray[np.float64]:
    """The logits of one image (512, 512), by numpy."""
    padded = np.pad(image.astype(np.float64), 1)
    shifts = [padded[y : y + image.shape[0], x : x + image.shape[1]] for y in range(3) for x in range(3)]
    return GAIN * (np.mean(shifts, axis=0) - LESION_IMAGE) + _LOGIT


def constant(model: onnx.ModelProto, name: str) -> NDArray[np.generic]:
    """The value of an initializer."""
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))


def set_constant(model: onnx.ModelProto, name: str, value: NDArray[np.generic] | np.generic) -> None:
    """Replace an initializer."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def with_node_after(model: onnx.ModelProto, value: str, make: Callable[[str, str], list[onnx.NodeProto]]) -> None:
    """Put nodes between ``value`` and its readers; ``make`` gets the names of what goes in and what comes out."""
    place = next(place for place, node in enumerate(model.graph.node) if value in node.output)
    node = model.graph.node[place]
    hidden = f"{value}_before"
    for position, name in enumerate(node.output):
        if name == value:
            node.output[position] = hidden
    for offset, added in enumerate(make(hidden, value)):
        model.graph.node.insert(place + 1 + offset, added)


def noisy_slices(positives: list[bool], seed: int = 0, side: int = 64) -> NDArray[np.int16]:
    """Slices int16 (n, side, side), HU, whose lesion pixels lie on both sides of the threshold."""
    rng = np.random.default_rng(seed)
    hu = probe_network.slices(positives, side).astype(np.float64)
    return (hu + rng.normal(0.0, 60.0, hu.shape)).round().astype(np.int16)


def half_stored(model: onnx.ModelProto, name: str) -> None:
    """Store an initializer in FP16 and cast it to FP32 where it is used, as the exported network does."""
    value = constant(model, name)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), f"{name}_half"))
    model.graph.node.insert(0, helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))


def single_slice_unet() -> onnx.ModelProto:
    """A network with the contract's free batch axis that in fact takes one slice only."""
    model = unet()
    one = numpy_helper.from_array(np.array([1, 1, 512, 512], np.int64), "one")
    model.graph.initializer.append(one)
    with_node_after(model, "LOGITS", lambda before, after: [helper.make_node("Reshape", [before, "one"], [after])])
    return model


def noisy_weights(model: onnx.ModelProto) -> None:
    """A tenth of noise on the weights."""
    weight = constant(model, "weight")
    noise = np.random.default_rng(1).normal(0, 0.1 * float(weight.mean()), weight.shape)
    set_constant(model, "weight", (weight + noise).astype(np.float32))


def more_pixels(model: onnx.ModelProto) -> None:
    """A verdict that asks for more lesion pixels."""
    set_constant(model, "enough", np.int32(10**5))


def reversed_bits(model: onnx.ModelProto) -> None:
    """The bits of each byte of the mask the other way round."""
    set_constant(model, "weights", constant(model, "weights")[::-1].copy())


def miscounted(model: onnx.ModelProto) -> None:
    """One lesion pixel more than the mask has."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int32), "surplus"))
    with_node_after(
        model, "LESION_PIXELS", lambda before, after: [helper.make_node("Add", [before, "surplus"], [after])]
    )
