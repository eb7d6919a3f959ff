"""Shadow traffic on a real Triton that serves three versions: the same network agrees, an altered one is found out."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import probe_network
from client_study import study_of
from command import groundglass
from groundglass.errors import VersionGone
from groundglass.study import SliceSource
from groundglass_client.connection import connect
from groundglass_client.session import SessionSettings, analyse
from groundglass_client.shadow import ShadowSettings, ShadowTransport
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from groundglass_ensemble.versions import VersionFolder

pytestmark = pytest.mark.triton

SIDE = 32
VERSIONS = (1, 2, 3)
ALTERED_PIXELS = 20_000
"""Lesion pixels that version 3 wants before it calls a slice positive."""
SESSION = SessionSettings(chunk_bytes=4 * SIDE * SIDE * 2)
REPLAY = ShadowSettings(patient=True)


@pytest.fixture(scope="module")
def server(probe_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedTriton]:
    """Version 1 of the probe network is live, 2 is the same file, 3 is altered; each can be asked for by name."""
    repository = tmp_path_factory.mktemp("shadow") / "repository"
    shutil.copytree(probe_repository, repository)
    shutil.copytree(repository / "unet" / "1", repository / "unet" / "2")
    (repository / "unet" / "3").mkdir()
    onnx.save(altered(), repository / "unet" / "3" / "model.onnx")
    folder = VersionFolder(repository)
    folder.set_loaded(VERSIONS)
    folder.set_live(1)
    for version in VERSIONS:
        folder.add_pinned(version)
    with EmbeddedTriton(ServeSettings(repository, control="explicit")) as running:
        yield running


def altered() -> onnx.ModelProto:
    """The probe network with a threshold that marks from 300 HU below the window's end, and counts otherwise."""
    model = probe_network.unet(ALTERED_PIXELS)
    for constant in model.graph.initializer:
        if constant.name == "threshold":
            constant.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.8), "threshold"))  # -150 HU
    return model


class Patterns:
    """Decodes to slices whose answers by every version are known."""

    def __init__(self, kinds: str) -> None:
        """A letter a slice: ``.`` empty, ``d`` a small dense square, ``f`` a faint one, ``D`` all dense."""
        self.kinds = kinds

    def __call__(self, source: SliceSource) -> NDArray[np.int16]:
        hu = np.full((SIDE, SIDE), -1000, np.int16)
        kind = self.kinds[source.index]
        if kind in "dD":
            hu[8:16, 8:16] = 40
        if kind == "D":
            hu[:] = 40
        if kind == "f":
            hu[8:16, 8:16] = -75
        return hu


@pytest.mark.parametrize("shared_memory", [True, False])
def test_the_same_file_agrees(server: EmbeddedTriton, shared_memory: bool) -> None:
    """A version of the same bytes has the same masks, areas and verdicts, wherever the live pixels and masks lie."""
    kinds = "..dd" * 10
    with (
        connect(server.grpc_address, shared_memory=shared_memory) as transport,
        ShadowTransport(transport, "2", REPLAY) as shadow,
    ):
        analysis = analyse(study_of(len(kinds), SIDE), shadow, Patterns(kinds), SESSION)
    report = shadow.report()
    assert report.agrees, report.as_text()
    assert (report.slices_compared, report.slices_with_mask, report.scans_compared) == (40, 40, 1)
    assert (report.dice_worst, report.live_versions) == (1.0, ("1",))
    assert report.live_latency is not None
    assert report.candidate_latency is not None
    assert [result.positive for result in analysis.report.slices] == [kind == "d" for kind in kinds]


def test_an_altered_network_is_found_on_exactly_its_slices(server: EmbeddedTriton, tmp_path: Path) -> None:
    """Slices whose mask or verdict version 3 changes are counted and pictured, the live report is version 1's own."""
    kinds = "..ffDDDDddDDDDDDDDDDDDDD..f."
    with (
        connect(server.grpc_address) as transport,
        ShadowTransport(transport, "3", replace(REPLAY, pictures=5)) as shadow,
    ):
        analysis = analyse(study_of(len(kinds), SIDE), shadow, Patterns(kinds), SESSION)
    report = shadow.report()
    faint, small = ([index for index, kind in enumerate(kinds) if kind == letter] for letter in "fd")
    assert report.slices_compared == len(kinds)
    assert (report.slices_mask_differs, report.slices_pixels_differ) == (len(faint), len(faint))
    assert report.slices_verdict_differs == len(small)
    assert report.slices_disagreeing == len(faint) + len(small)
    assert [found.index for found in report.worst] == [*small, *faint]
    assert {found.differing_pixels for found in report.worst} == {0, 128 * 128}
    assert (report.dice_worst, report.candidate_failures, report.skipped) == (0.0, 0, 0)
    assert (report.scans_compared, report.scans_verdict_differs, report.scans_run_differs) == (1, 1, 1)
    names = [path.name for path in shadow.write_pictures(tmp_path)]
    assert names == [f"disagreement_{rank:02d}_slice_{index:04d}.png" for rank, index in enumerate([*small, *faint], 1)]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert analysis.report.model_version == "1"
    assert (analysis.report.scan_positive, analysis.report.longest_run) == (True, 20)


def test_a_version_that_is_not_loaded_is_refused_at_the_start(server: EmbeddedTriton) -> None:
    """A study under a shadow that the server does not know fails at once, and says which versions there are."""
    with (
        connect(server.grpc_address) as transport,
        ShadowTransport(transport, "9", REPLAY) as shadow,
        pytest.raises(VersionGone, match=r"ct_scan_v9.*by name: 1, 2, 3"),
    ):
        analyse(study_of(4, SIDE), shadow, Patterns("...."), SESSION)


def test_the_command_replays_a_phantom(server: EmbeddedTriton, tmp_path: Path) -> None:
    """`models shadow` exits with 0 for the same network, and with 1, one line and pictures for an altered one."""
    same = groundglass("models", "shadow", "2", "--server", server.grpc_address, "--seconds", "2", "--json")
    assert same.returncode == 0, same.stderr
    report = json.loads(same.stdout)
    assert report["agrees"]
    assert report["slices_compared"] % 24 == 0
    assert report["scans_compared"] == report["slices_compared"] // 24 > 1
    out = tmp_path / "out"
    other = groundglass("models", "shadow", "3", "--server", server.grpc_address, "--out", out, "--pictures", "3")
    assert other.returncode == 1
    (line,) = other.stderr.strip().splitlines()
    assert re.fullmatch(r"groundglass: version 3 does not agree with version 1: \d+ of 24 slices disagree.*", line)
    assert "does not agree" in other.stdout
    written = json.loads((out / "shadow.json").read_text())
    assert len(written["worst"]) == 3
    assert len(list(out.glob("disagreement_*.png"))) == 3
    assert {path.suffix for path in out.iterdir()} == {".json", ".png"}


def test_the_command_refuses_the_live_version(server: EmbeddedTriton) -> None:
    """The live version is no candidate of itself, and a version that is not loaded is none at all."""
    for version, words in (("1", "version 1 is live"), ("9", "no model ct_scan_v9")):
        done = groundglass("models", "shadow", version, "--server", server.grpc_address)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.strip().splitlines()
        assert words in line


def test_a_study_is_analysed_with_a_shadow_beside_it(server: EmbeddedTriton, tmp_path: Path) -> None:
    """`analyze --shadow` reports the live version's answer, and writes what the candidate said otherwise."""
    study = tmp_path / "study"
    assert groundglass("phantom", "--slices", "20", "--lesion", "2:18", "--out", study).returncode == 0
    plain = groundglass("analyze", study, "--server", server.grpc_address, "--json", "-")
    found = {}
    for version in ("2", "3"):
        out = tmp_path / f"shadow-{version}"
        done = groundglass(
            *("analyze", study, "--server", server.grpc_address, "--json", "-"),
            *("--shadow", version, "--shadow-out", out),
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["slices"] == json.loads(plain.stdout)["slices"]
        assert f"shadow of version {version}: " in done.stderr
        found[version] = json.loads((out / "shadow.json").read_text())
    assert found["2"]["slices_compared"] + found["2"]["skipped"] > 0
    assert found["2"]["slices_disagreeing"] == 0
    assert found["3"]["slices_disagreeing"] > 0
