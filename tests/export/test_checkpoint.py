"""Checkpoints: what is saved is read back, what is broken is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from groundglass.errors import CheckpointError
from groundglass_export.calibration import Calibration
from groundglass_export.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from groundglass_export.network import LesionUnet


def test_saved_weights_come_back_as_fp16_holds_them(random_checkpoint: Checkpoint, checkpoint_file: Path) -> None:
    """Weights are rounded to FP16 once; calibration and training summary travel along."""
    loaded = load_checkpoint(checkpoint_file)
    assert loaded.calibration == random_checkpoint.calibration
    assert loaded.training == {"steps": 0}
    stored = loaded.network.state_dict()
    for key, tensor in random_checkpoint.network.state_dict().items():
        assert torch.equal(stored[key], tensor.half().float() if tensor.is_floating_point() else tensor), key


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_pickles_of_other_training_scripts(prefix: str, wrapper: str | None, tmp_path: Path) -> None:
    """Pickled weights load with the usual wrappers and prefixes, 3-channel stems included."""
    state = LesionUnet(3).state_dict()
    prefixed = {prefix + key: tensor for key, tensor in state.items()}
    torch.save({wrapper: prefixed, "epoch": 3} if wrapper else prefixed, tmp_path / "theirs.pth")
    loaded = load_checkpoint(tmp_path / "theirs.pth")
    assert loaded.in_channels == 3
    assert loaded.calibration == Calibration()
    assert torch.equal(loaded.network.state_dict()["encoder.bn4.weight"], state["encoder.bn4.weight"])


class _Harmful:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    """A pickle that would call a function is refused, and the function is not called."""
    torch.save({"weights": _Harmful(tmp_path / "made")}, tmp_path / "harmful.pt")
    with pytest.raises(CheckpointError, match=r"harmful\.pt"):
        load_checkpoint(tmp_path / "harmful.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("kept_bytes", [0, 7, 1000, 1_000_000])
def test_truncated_safetensors(kept_bytes: int, checkpoint_file: Path, tmp_path: Path) -> None:
    """A checkpoint cut short is refused by name, wherever it was cut."""
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint_file.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors is corrupted"):
        load_checkpoint(cut)


def test_keys_of_another_network_are_named(tmp_path: Path) -> None:
    """Missing, unexpected and reshaped weights are named."""
    state = LesionUnet().state_dict()
    state["head.weight"] = state.pop("encoder.bn1.weight")
    state["encoder.bn2.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "other.pt")
    assert all(word in str(caught.value) for word in ("other.pt", "encoder.bn1.weight", "head.weight", "(64,)"))


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """A NaN among the weights is found when they are read."""
    state = LesionUnet().state_dict()
    state["encoder.bn1.bias"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"not finite: encoder\.bn1\.bias"):
        load_checkpoint(tmp_path / "nan.pt")


def test_a_weight_beyond_fp16_leaves_the_old_file(checkpoint_file: Path, tmp_path: Path) -> None:
    """Saving weights that FP16 can't hold fails, and the file of that name stays as it was."""
    path = tmp_path / "kept.safetensors"
    path.write_bytes(b"old")
    network = load_checkpoint(checkpoint_file).network
    with torch.no_grad():
        network.encoder.bn1.weight[0] = 1e6
    with pytest.raises(CheckpointError, match="FP16"):
        save_checkpoint(path, Checkpoint(network, Calibration()))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_variance_beyond_fp16_is_kept(tmp_path: Path) -> None:
    """A batch norm's variance that FP16 can't hold comes back as it was; other tensors of the file are FP16."""
    network = LesionUnet()
    variance = network.decoder.blocks[0].conv1[1].running_var
    assert isinstance(variance, torch.Tensor)
    variance[3] = 95_122.875
    save_checkpoint(tmp_path / "x.safetensors", Checkpoint(network, Calibration()))
    state = load_checkpoint(tmp_path / "x.safetensors").network.state_dict()
    assert torch.equal(state["decoder.blocks.0.conv1.1.running_var"], variance)
    assert (tmp_path / "x.safetensors").stat().st_size < 2.1 * sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("name", ["absent.safetensors", "weights.bin.gz"])
def test_no_checkpoint(name: str, tmp_path: Path) -> None:
    """A missing file and an unknown format are refused by name."""
    if name.endswith("gz"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(("threshold", "pixels"), [(0.0, 10), (1.0, 10), (0.5, 0)])
def test_calibration_bounds(threshold: float, pixels: int) -> None:
    """A calibration that can't decide anything is refused."""
    with pytest.raises(CheckpointError):
        Calibration(threshold, pixels)
