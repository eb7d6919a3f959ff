"""The one place that knows nvidia-modelopt: its autocast, which turns FP32 nodes into FP16 and puts casts between."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import onnx

from groundglass.errors import MissingExtra, ModelError
from groundglass_export.graph_types import one_line

PACKAGES = ("nvidia-modelopt", "onnx")
"""Packages that decide the bytes of an FP16 graph."""


def autocast(model: onnx.ModelProto, keep_fp32: Collection[str]) -> onnx.ModelProto:
    """``model`` in FP16 but for the nodes named in ``keep_fp32``; types of inputs and outputs are kept.

    Which nodes stay FP32 is the caller's to decide: modelopt's own measurement holds every value of every image in
    memory at once. An operator that has no FP16 form is left in FP32 by modelopt.

    Raises MissingExtra without modelopt, ModelError when it can't convert the graph.
    """
    with _silence(), tempfile.TemporaryDirectory() as folder:
        convert = _converter()
        path = Path(folder) / "fp32.onnx"
        try:
            onnx.save(model, path)
            converted: onnx.ModelProto = convert(
                str(path),
                low_precision_type="fp16",
                nodes_to_exclude=[f"{re.escape(name)}$" for name in keep_fp32],
                data_max=math.inf,
                init_max=math.inf,
                keep_io_types=True,
            )
        except Exception as error:  # modelopt raises plain Exception, what onnx raises, and OSError
            raise ModelError(f"{model.graph.name!r} could not be cast to FP16: {one_line(error)}") from error
    return converted


def _converter() -> Callable[..., Any]:
    """Imported here: modelopt takes seconds to import, and pulls torch."""
    try:
        module = importlib.import_module("modelopt.onnx.autocast")
    except ImportError as error:
        missing = re.search(r"No module named '([\w.]+)'", str(error))
        name = "nvidia-modelopt"
        if missing and not missing.group(1).startswith("modelopt"):
            name = f"{missing.group(1)}, which nvidia-modelopt imports,"
        raise MissingExtra(name, "export") from error
    convert: Callable[..., Any] = module.convert_to_mixed_precision
    return convert


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """modelopt logs every step to stdout, which belongs to our results, and warns of its own future."""
    silent = [logging.getLogger(name) for name in ("modelopt.onnx", "modelopt.onnx.autocast")]
    before = [logger.disabled for logger in silent]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            for logger in silent:
                logger.disabled = True
            yield
    finally:
        for logger, disabled in zip(silent, before, strict=True):
            logger.disabled = disabled
