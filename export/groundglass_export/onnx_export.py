"""A checkpoint becomes the two ONNX models that are served, checked against torch before anything is put in place."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from groundglass.contract import IMAGE_SIDE, PREPROCESS, UNET, ModelSpec
from groundglass.errors import ModelError
from groundglass.manifest import Manifest, Source, file_digest, write_manifest
from groundglass.publish import published
from groundglass_export.checkpoint import Checkpoint, load_checkpoint
from groundglass_export.engine import LOGITS
from groundglass_export.graphs import Preprocess, served_unet
from groundglass_export.parity import Parity, ParityLimits, check_parity, synthetic_slices
from groundglass_export.provenance import current_versions, lung_window

OPSET = 20
MODEL_FILE = "model.onnx"
FIRST_VERSION = 1


def export_onnx(
    checkpoint: Path,
    out: Path,
    slices_hu: Sequence[NDArray[np.int16]] = (),
    version: int = FIRST_VERSION,
    limits: ParityLimits | None = None,
) -> list[Path]:
    """Write ``out/preprocess/1/model.onnx`` and ``out/unet/1/model.onnx``, each with its manifest.

    Both take any batch size. They are compared with torch on synthetic slices and on ``slices_hu`` (int16 (rows, cols),
    HU) first. Files in ``out`` are replaced only if that passes. The same checkpoint and the same package versions give
    the same bytes. Returns the paths of the two models.

    Raises CheckpointError, ParityError, and ModelError when a file can't be written.
    """
    loaded = load_checkpoint(checkpoint)
    models = {PREPROCESS: preprocess_model(), UNET: unet_model(loaded)}
    parity = check_parity(
        loaded, models[PREPROCESS], models[UNET], [*synthetic_slices(), *slices_hu], limits or ParityLimits()
    )
    try:
        return [
            _place(model, out / spec.name / str(version), _manifest(spec, loaded, checkpoint, parity))
            for spec, model in models.items()
        ]
    except OSError as error:
        raise ModelError(f"the export to {out} was not written: {error}") from error


def preprocess_model() -> onnx.ModelProto:
    """HU -> IMAGE; batch, rows and columns are free."""
    example = torch.zeros(2, 300, 400, dtype=torch.int16)  # no two sizes alike, or the exporter would tie them
    free = {"hu": {0: Dim("batch"), 1: Dim("rows"), 2: Dim("cols")}}
    return _exported(Preprocess().eval(), example, free, PREPROCESS)


def unet_model(checkpoint: Checkpoint) -> onnx.ModelProto:
    """IMAGE -> MASK, LESION_PIXELS, SLICE_POSITIVE; the batch is free."""
    example = torch.zeros(2, 1, IMAGE_SIDE, IMAGE_SIDE)
    model = _exported(served_unet(checkpoint), example, {"image": {0: Dim("batch")}}, UNET, extra_outputs=(LOGITS,))
    del model.graph.output[len(UNET.outputs) :]  # the value stays inside, where the parity check finds it
    return model


def _exported(
    module: nn.Module,
    example: Tensor,
    dynamic_shapes: dict[str, Any],
    spec: ModelSpec,
    *,
    extra_outputs: tuple[str, ...] = (),
) -> onnx.ModelProto:
    with _quiet_exporter():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[*(tensor.name for tensor in spec.outputs), *extra_outputs],
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    if program is None:
        raise ModelError(f"torch exported nothing for {spec.name}")
    model = _stripped(program.model_proto)
    onnx.checker.check_model(model, full_check=True)
    return model


def _stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the exporter's notes: they hold source paths, and would make every machine's file differ."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    return model


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch's exporter warns of its own deprecations and of packages that it could use; neither is the caller's."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _manifest(spec: ModelSpec, checkpoint: Checkpoint, path: Path, parity: Parity) -> Manifest:
    """The digest of the model is filled in once the file is written."""
    decides = spec is UNET
    return Manifest(
        model=spec.name,
        file=MODEL_FILE,
        model_sha256="",
        sources=(Source("checkpoint", path.name, file_digest(path)),),
        precision="fp32",
        precision_detail={"weights": "stored as fp16 where that loses nothing"} if decides else {},
        opset=OPSET,
        window_hu=lung_window(),
        calibration=checkpoint.calibration.as_dict() if decides else {},
        parity=parity.as_dict(),
        training=checkpoint.training if decides else {},
        versions=current_versions(),
    )


def _place(model: onnx.ModelProto, folder: Path, manifest: Manifest) -> Path:
    """Model first, manifest last: until both are new, the manifest's digest shows that they don't belong together."""
    path = folder / manifest.file
    with published(path) as beside:
        beside.write_bytes(model.SerializeToString(deterministic=True))
    write_manifest(path, manifest.with_digest(file_digest(path)))
    return path
