"""Models that run here: an exported graph, or a checkpoint by way of the graphs that it would be served as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groundglass.errors import CheckpointError, ModelError
from groundglass.manifest import check_digest, file_digest, manifest_path, read_manifest
from groundglass.study import Study
from groundglass_export.answers import Engine
from groundglass_export.derivation import engine_of, preprocess_of
from groundglass_export.engine import OnnxEngine, OnnxPreprocess
from groundglass_export.evaluation.prediction import DecodeHu, ModelIdentity, Predictions
from groundglass_export.provenance import current_versions


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A pair of graphs in this process. Slices go through one by one: a batch would change no answer."""

    preprocess: OnnxPreprocess
    engine: Engine
    who: ModelIdentity

    def predict(self, study: Study, decode_hu: DecodeHu, on_slices: Callable[[int], None]) -> Predictions:
        """See :meth:`Predictor.predict`."""
        answers = []
        for source in study.slices:
            answer = self.engine.answers(self.preprocess.image(decode_hu(source))[None])
            answers.append((np.packbits(answer.mask, axis=2), answer.pixels, answer.positive))
            on_slices(1)
        masks, pixels, positive = (np.concatenate(rows) for rows in zip(*answers, strict=True))
        return Predictions(masks, pixels, positive)

    def identity(self) -> ModelIdentity:
        """See :meth:`Predictor.identity`."""
        return self.who


def open_model(path: Path, preprocess: Path | None = None) -> LocalModel:
    """A ``unet`` graph as exported, with the ``preprocess`` graph of its repository or the one named.

    A file that has a manifest must be the manifest's. Raises ModelError, RepositoryError, and SettingError where no
    preprocess graph is.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected the model.onnx of a unet")
    checkpoints: list[str] = []
    if manifest_path(path).exists():
        manifest = read_manifest(path)
        check_digest(path, manifest)
        checkpoints = [source.sha256 for source in manifest.sources if source.role == "checkpoint"]
    window = preprocess or preprocess_of(path)
    engine = engine_of(path)
    who = ModelIdentity(
        way="model",
        name=path.name,
        sha256=engine.digest,
        preprocess_sha256=file_digest(window) if window.is_file() else None,
        checkpoint_sha256=checkpoints[0] if checkpoints else None,
        precision=engine.precision,
        versions=current_versions(("groundglass", "numpy", "onnxruntime")),
    )
    return LocalModel(OnnxPreprocess(window), engine, who)


def open_checkpoint(path: Path) -> LocalModel:
    """A checkpoint, exported in memory and held against torch on a slice, then run as the graphs that would be served.

    So its figures are those of the served model, and not of another implementation of it. Raises CheckpointError for a
    file that is none, ParityError when the graphs differ from torch, and ModuleNotFoundError without torch.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a .safetensors, .pt or .pth checkpoint")
    # Here, so that graphs and servers are evaluated without torch.
    from groundglass_export.checkpoint import load_checkpoint
    from groundglass_export.onnx_export import preprocess_model, unet_model
    from groundglass_export.parity import ParityLimits, check_parity, synthetic_slices

    checkpoint = load_checkpoint(path)
    preprocess, unet = preprocess_model(), unet_model(checkpoint)
    check_parity(checkpoint, preprocess, unet, synthetic_slices(1), ParityLimits())
    digest = file_digest(path)
    who = ModelIdentity(
        way="checkpoint",
        name=path.name,
        sha256=digest,
        checkpoint_sha256=digest,
        precision="fp32",
        versions=current_versions(("groundglass", "numpy", "onnxruntime", "torch", "onnxscript")),
    )
    return LocalModel(OnnxPreprocess(preprocess), OnnxEngine(unet), who)
