"""The shipped repository on real scans: what the server answers is what torch computes, in anatomical order."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from groundglass_client.intake import decode_hu, open_study
from groundglass_client.session import ScanAnalysis, SessionSettings, analyse
from groundglass_client.transport import GrpcTransport
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from groundglass_export.checkpoint import load_checkpoint
from groundglass_export.graphs import Preprocess, served_unet

pytestmark = [pytest.mark.triton, pytest.mark.slow]

PROJECT = Path(__file__).parents[2]
CHECKPOINT = PROJECT / "export" / "weights" / "groundglass_unet.safetensors"
MIN_MASK_AGREEMENT = 0.999
COMPARED_SLICES = 6


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedTriton]:
    """The shipped repository, served."""
    with EmbeddedTriton(ServeSettings(repository=PROJECT / "model_repository")) as triton:
        yield triton


@pytest.fixture(scope="module")
def analysis(server: EmbeddedTriton, data_root: Path) -> ScanAnalysis:
    """P001 through the server."""
    with (
        open_study(data_root / "covid_ct_md" / "P001") as study,
        GrpcTransport(server.grpc_address) as transport,
    ):
        return analyse(study, transport, decode_hu, SessionSettings(request_timeout_s=280))


@pytest.mark.timeout(900)
def test_slices_come_in_anatomical_order(analysis: ScanAnalysis, data_root: Path) -> None:
    """The report lists P001's slices head to feet, as its labels file does, and loses none to the repeated SOP UID."""
    labels = json.loads((data_root / "covid_ct_md" / "P001_slice_labels.json").read_text())
    results = analysis.report.slices
    assert [os.path.basename(result.source.file) for result in results] == [label["file"] for label in labels]
    assert [result.source.position_mm for result in results] == pytest.approx([label["z_mm"] for label in labels])


@pytest.mark.timeout(900)
def test_served_masks_and_verdicts_are_torchs(analysis: ScanAnalysis) -> None:
    """On slices across P001 the served mask agrees with torch on 99.9 % of pixels, and the verdicts are identical."""
    assert analysis.masks is not None
    chosen = np.linspace(0, len(analysis.report.slices) - 1, COMPARED_SLICES + 2).astype(int)[1:-1]
    preprocess, unet = Preprocess(), served_unet(load_checkpoint(CHECKPOINT))
    for index in chosen:
        result = analysis.report.slices[index]
        hu = torch.from_numpy(decode_hu(result.source))[None]
        with torch.inference_mode():
            mask, pixels, positive, _ = unet(preprocess(hu))
        agreement = np.unpackbits(analysis.masks[index]) == np.unpackbits(mask[0].numpy())
        assert agreement.mean() >= MIN_MASK_AGREEMENT
        assert bool(positive) == result.positive
        assert abs(int(pixels) - result.lesion_pixels) <= (1 - MIN_MASK_AGREEMENT) * agreement.size


@pytest.mark.parametrize(
    ("lesion", "positive"), [("4:24", True), ("none", False)], ids=["ground-glass in 20 slices", "none"]
)
def test_the_phantoms_verdict_follows_its_lesion(lesion: str, positive: bool, tmp_path: Path) -> None:
    """The commands of the demo, embedded server included: a region of 20 slices is found, and nothing without it."""
    study = tmp_path / "study"
    run("phantom", "--slices", "28", "--lesion", lesion, "--out", str(study))
    analyzed = run("analyze", str(study), "--repository", str(PROJECT / "model_repository"), "--json", "-")
    report = json.loads(analyzed)
    assert report["scan_positive"] is positive
    assert [item["index"] for item in report["slices"] if item["positive"]] == (list(range(4, 24)) if positive else [])


def run(*arguments: str) -> str:
    """The standard output of a command that must succeed."""
    command = [sys.executable, "-m", "groundglass", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=True).stdout
