"""The exported graphs, run under ONNX Runtime, against numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groundglass.contract import PREPROCESS, UNET, ModelSpec
from groundglass.errors import CheckpointError, ParityError
from groundglass.manifest import Source, file_digest, read_manifest
from groundglass_export.calibration import Calibration
from groundglass_export.checkpoint import Checkpoint, load_checkpoint
from groundglass_export.engine import open_session
from groundglass_export.graphs import ServedUnet, grey_network
from groundglass_export.network import LesionUnet
from groundglass_export.onnx_export import export_onnx, preprocess_model
from groundglass_export.parity import ParityLimits, synthetic_slices

ONNX_TYPES = {"INT16": 5, "FP32": 1, "UINT8": 2, "INT32": 6, "BOOL": 9}


@pytest.fixture(scope="module")
def exported(checkpoint_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both models of the random network."""
    out = tmp_path_factory.mktemp("exported")
    export_onnx(checkpoint_file, out)
    return out


def _bilinear(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half-pixel bilinear to 512x512, one axis after the other, written from its definition."""
    for axis in (0, 1):
        length = image.shape[axis]
        position = np.clip((np.arange(512) + 0.5) * length / 512 - 0.5, 0, length - 1)
        low = np.floor(position).astype(int)
        share = (position - low).reshape((-1, 1) if axis == 0 else (1, -1))
        image = image.take(low, axis) * (1 - share) + image.take(np.minimum(low + 1, length - 1), axis) * share
    return image


@pytest.mark.parametrize("size", [(512, 512), (256, 256), (768, 768), (1024, 1024), (300, 640), (1, 1)])
def test_preprocess_is_window_then_bilinear(size: tuple[int, int]) -> None:
    """HU of any size, the extremes of int16 included, become the windowed 512x512 image."""
    hu = np.random.default_rng(1).integers(-32768, 32768, size=(2, *size)).astype(np.int16)
    hu[1] = np.random.default_rng(2).integers(-1400, 200, size=size)
    (image,) = open_session(preprocess_model(), "preprocess").run(None, {"HU": hu})
    for given, found in zip(hu, image[:, 0], strict=True):
        windowed = np.clip((given.astype(np.float64) + 1350.0) / 1500.0, 0.0, 1.0)
        np.testing.assert_allclose(found, _bilinear(windowed), atol=2e-5 if size == (1, 1) else 1e-4)


def test_a_512_slice_is_not_resampled() -> None:
    """At the served size the image is the windowed slice, bit for bit."""
    hu = np.random.default_rng(3).integers(-2000, 2000, size=(1, 512, 512)).astype(np.int16)
    (image,) = open_session(preprocess_model(), "preprocess").run(None, {"HU": hu})
    expected = np.clip((hu.astype(np.float32) - np.float32(-1350)) / np.float32(1500), np.float32(0), np.float32(1))
    assert np.array_equal(image[:, 0], expected)


class _Given(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image


@pytest.mark.parametrize("min_pixels", [1, 130_000, 262_144])
def test_tail_against_numpy(min_pixels: int) -> None:
    """Mask bits, pixel count and verdict are those of numpy; a pixel at the threshold is lesion."""
    logits = torch.randn(3, 1, 512, 512, generator=torch.Generator().manual_seed(4))
    logits[1] = -9.0
    logits[2] = float(np.float32(math.log(0.7 / 0.3)))
    mask, pixels, positive, _ = ServedUnet(_Given(), Calibration(0.7, min_pixels))(logits)
    lesion = logits[:, 0].numpy() >= np.float32(math.log(0.7 / 0.3))
    assert np.array_equal(mask.numpy(), np.packbits(lesion, axis=2))
    assert np.array_equal(pixels.numpy()[:, 0], lesion.sum(axis=(1, 2)))
    assert np.array_equal(positive.numpy()[:, 0], lesion.sum(axis=(1, 2)) >= min_pixels)
    assert int(pixels[2]) == 512 * 512


@pytest.mark.parametrize("spec", [PREPROCESS, UNET])
def test_graphs_keep_the_contract(spec: ModelSpec, exported: Path) -> None:
    """Names, types and shapes are those of the contract, with a free batch axis, in one file."""
    folder = exported / spec.name / "1"
    graph = onnx.load(folder / "model.onnx").graph
    for tensors, found in ((spec.inputs, graph.input), (spec.outputs, graph.output)):
        assert [value.name for value in found] == [tensor.name for tensor in tensors]
        for tensor, value in zip(tensors, found, strict=True):
            shape = value.type.tensor_type.shape.dim
            assert value.type.tensor_type.elem_type == ONNX_TYPES[tensor.datatype]
            assert shape[0].dim_param
            assert [dim.dim_value if not dim.dim_param else -1 for dim in shape[1:]] == list(tensor.dims)
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.manifest.json"]


def test_exported_pair_equals_torch_in_a_batch(exported: Path, checkpoint_file: Path) -> None:
    """Three slices in one batch give torch's masks, counts and verdicts."""
    checkpoint = load_checkpoint(checkpoint_file)
    hu = np.stack([item for item in synthetic_slices(3, seed=11) if item.shape == (512, 512)])
    preprocess, unet = (
        open_session(onnx.load(exported / name / "1" / "model.onnx"), name) for name in ("preprocess", "unet")
    )
    (image,) = preprocess.run(None, {"HU": hu})
    mask, pixels, positive = unet.run(None, {"IMAGE": image})
    with torch.inference_mode():
        lesion = torch.sigmoid(checkpoint.network(torch.from_numpy(image)))[:, 0].numpy() >= 0.5001
    assert 0.01 < lesion.mean() < 0.99  # a mask that is empty or full would prove little
    assert (np.unpackbits(mask, axis=2) == lesion).mean() >= 0.999
    assert np.array_equal(positive[:, 0], pixels[:, 0] >= 300)


def test_weights_are_stored_in_half_the_bytes(exported: Path) -> None:
    """The file is little more than two bytes a parameter."""
    assert (exported / "unet" / "1" / "model.onnx").stat().st_size < 2.1 * 28_768_825


def test_manifest_says_where_the_model_came_from(exported: Path, checkpoint_file: Path) -> None:
    """Digests, window, calibration, versions and parity are in the manifest; paths are not."""
    folder = exported / "unet" / "1"
    manifest = read_manifest(folder / "model.onnx")
    assert manifest.model_sha256 == file_digest(folder / "model.onnx")
    assert manifest.sources == (Source("checkpoint", "random.safetensors", file_digest(checkpoint_file)),)
    assert manifest.calibration == {"probability_threshold": 0.5001, "min_lesion_pixels": 300}
    assert manifest.window_hu == {"centre": -600.0, "width": 1500.0}
    assert manifest.opset == 20
    assert manifest.parity["mask_agreement"] >= 0.999
    assert manifest.versions["torch"] == torch.__version__
    for name in ("model.onnx.manifest.json", "model.onnx"):
        assert str(Path(__file__).parents[2]).encode() not in (folder / name).read_bytes()


def test_same_checkpoint_same_bytes(exported: Path, checkpoint_file: Path, tmp_path: Path) -> None:
    """A second export writes the same four files."""
    export_onnx(checkpoint_file, tmp_path)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 4
    assert all((exported / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_failed_parity_writes_nothing(checkpoint_file: Path, tmp_path: Path) -> None:
    """An export that breaks a limit raises with the figure, and leaves no file."""
    with pytest.raises(ParityError, match=r"mask agreement 1, allowed 1\.5"):
        export_onnx(checkpoint_file, tmp_path / "out", limits=ParityLimits(mask_agreement=1.5))
    assert not (tmp_path / "out").exists()


def test_missing_checkpoint_writes_nothing(tmp_path: Path) -> None:
    """Without a checkpoint there is an error that names it, and no folder."""
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        export_onnx(tmp_path / "none.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_three_channel_stem_is_summed() -> None:
    """A network of three channels answers a grey image as it answers three equal channels."""
    torch.manual_seed(6)
    checkpoint = Checkpoint(LesionUnet(3).eval(), Calibration())
    image = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        expected = checkpoint.network(image.expand(1, 3, 64, 64))
        assert torch.allclose(grey_network(checkpoint)(image), expected, atol=1e-5)


def test_manifest_is_stable_json(exported: Path) -> None:
    """The manifest is sorted, so that two of them can be compared as text."""
    text = (exported / "preprocess" / "1" / "model.onnx.manifest.json").read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
