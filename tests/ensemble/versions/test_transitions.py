"""Transitions against a real Triton: what may go live does, what may not is refused, and the live version serves on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import probe_network
import versioned
from calls import infer, scan_rows
from groundglass import contract
from groundglass.errors import ServerRefused, ServerUnreachable, VersionRefused
from groundglass.manifest import manifest_path, read_manifest
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from groundglass_ensemble.repository import find_problems
from groundglass_ensemble.versions import (
    Candidate,
    Check,
    Desk,
    Journal,
    ServerControl,
    State,
    VersionFolder,
    Watch,
    promote,
    retire,
    rollback,
    settle,
    stage,
    status,
    verify,
)
from groundglass_ensemble.versions.checks import check_files
from versioned import Bench, trusting

pytestmark = pytest.mark.triton
NO_WATCH = Watch(seconds=0.0)
NEVER = contract.IMAGE_SIDE**2 + 1
"""Lesion pixels that no slice has: a version that asks for so many calls everything negative."""


@pytest.fixture(autouse=True)
def _serves_afterwards(bench: Bench) -> Iterator[None]:
    """Whatever a test does, the live version answers afterwards, and the repository could be started from."""
    yield
    settle(bench.desk())
    served = bench.control.served()
    assert served.live == (bench.desk().folder.live() or 1)
    assert answers(bench, contract.CT_SCAN.name)
    assert find_problems(bench.repository, "cpu") == []
    assert status(bench.desk()).problems == ()


def answers(bench: Bench, model: str) -> bool:
    """Whether a model says what the probe network says."""
    found = infer(bench.server.grpc_address, model, scan_rows(b"", [0, 1], [True, False]))
    return found["SLICE_POSITIVE"].ravel().tolist() == [True, False]


def state_of(bench: Bench, version: int) -> str | None:
    """A version's state by ``status``, None for one that is not there."""
    return next((item.state for item in status(bench.desk()).versions if item.version == version), None)


def test_a_version_goes_from_file_to_live_and_back(bench: Bench) -> None:
    """Staged it is not loaded, verified it can be asked for by name, promoted it is live; and all the way back."""
    before = bench.desk().folder.live() or 1
    version = bench.staged()
    assert (state_of(bench, version), state_of(bench, before)) == ("staged", "live")
    assert version not in bench.control.served().loaded
    verification = verify(bench.desk(), version, trusting)
    assert verification.go
    assert state_of(bench, version) == "verified"
    assert bench.control.served().live == before
    assert answers(bench, contract.pinned(str(version)).name)
    promote(bench.desk(), version, NO_WATCH)
    assert (state_of(bench, version), state_of(bench, before)) == ("live", "verified")
    assert bench.control.served().live == version
    assert rollback(bench.desk()) == before
    assert bench.control.served().live == before
    assert rollback(bench.desk()) == version  # and forward again, as often as is wanted
    assert rollback(bench.desk()) == before
    retire(bench.desk(), version)
    assert state_of(bench, version) == "retired"
    assert version not in bench.control.served().loaded
    verify(bench.desk(), version, trusting)
    assert state_of(bench, version) == "verified"
    retire(bench.desk(), version, delete=True)
    assert state_of(bench, version) is None


@pytest.mark.parametrize(
    ("network", "manifest", "words"),
    [
        (b"no graph at all", {}, "does not load .*can't be loaded"),
        (versioned.other_contract(), {}, "does not load .*AREA|does not load .*LESION_PIXELS"),
    ],
    ids=["broken", "other contract"],
)
def test_what_does_not_load_is_refused_by_the_server(
    bench: Bench, network: onnx.ModelProto | bytes, manifest: dict[str, object], words: str
) -> None:
    """A broken file and another tensor contract are no-go, in one line with the server's reason."""
    version = bench.staged(network, **manifest)
    before = bench.control.served()
    with pytest.raises(VersionRefused, match=words) as refusal:
        verify(bench.desk(), version, trusting)
    assert "\n" not in str(refusal.value)
    assert bench.control.served() == before
    assert state_of(bench, version) == "staged"
    with pytest.raises(VersionRefused, match="it was not verified"):
        promote(bench.desk(), version, NO_WATCH)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ({"calibration": {"probability_threshold": 0.5, "min_lesion_pixels": 64}}, "thresholds: .*0.5, allowed .*0.9"),
        ({"calibration": {"probability_threshold": 0.9}}, "thresholds: probability_threshold 0.9, allowed min_lesion"),
        ({"calibration": {}}, "thresholds: missing"),
        ({"parity": {"passed": False}}, "parity gate of its export: failed"),
        ({"window_hu": {"centre": 40.0, "width": 400.0}}, "window, HU: centre 40"),
        ({"model": "preprocess"}, "model.onnx of preprocess"),
        ({"model_sha256": "0" * 64}, "is not the file of its manifest"),
    ],
    ids=["other threshold", "one threshold", "no thresholds", "failed parity", "window", "other model", "other file"],
)
def test_what_its_manifest_condemns_is_not_staged(
    bench: Bench, tmp_path: Path, manifest: dict[str, object], words: str
) -> None:
    """A version whose manifest says that it decides otherwise, failed, or is of something else never enters."""
    before = bench.desk().folder.versions()
    with pytest.raises(VersionRefused, match=words):
        stage(bench.desk(), [versioned.candidate(tmp_path / "candidate", **manifest)])
    assert bench.desk().folder.versions() == before


def test_a_file_without_manifest_or_of_another_name_is_not_staged(bench: Bench, tmp_path: Path) -> None:
    """The reason names the file."""
    file = versioned.candidate(tmp_path / "candidate")
    manifest_path(file).unlink()
    with pytest.raises(VersionRefused, match=r"has no manifest"):
        stage(bench.desk(), [file])
    with pytest.raises(VersionRefused, match=r"network\.bin: a version consists of model\.onnx or model\.plan"):
        stage(bench.desk(), [tmp_path / "network.bin"])
    with pytest.raises(VersionRefused, match=r"absent/model\.onnx: no such file"):
        stage(bench.desk(), [tmp_path / "absent" / "model.onnx"])
    with pytest.raises(VersionRefused, match="is there already"):
        stage(bench.desk(), [versioned.candidate(tmp_path / "candidate")], version=bench.desk().live())


def test_other_thresholds_enter_only_when_they_were_asked_for(bench: Bench, tmp_path: Path) -> None:
    """A retrained network decides otherwise by intent: its operator says so, at staging and again at verifying."""
    thresholds = {"probability_threshold": 0.9, "min_lesion_pixels": 100}
    file = versioned.candidate(tmp_path / "candidate", probe_network.unet(100), calibration=thresholds)
    version = stage(bench.desk(), [file], new_thresholds=True)
    with pytest.raises(VersionRefused, match="thresholds"):
        verify(bench.desk(), version, trusting)
    assert verify(bench.desk(), version, trusting, new_thresholds=True).go


def test_a_failed_trial_takes_the_candidate_away(bench: Bench) -> None:
    """While it is tried it answers by name; after a no-go nothing of it is left in servers or files."""
    version = bench.staged()
    name = contract.pinned(str(version)).name
    tables = []

    def trial(candidate: Candidate) -> list[Check]:
        assert (candidate.version, candidate.live) == (version, bench.control.served().live)
        assert answers(bench, name)
        assert version not in (bench.desk().folder.loaded() or ())  # a server that died now would come back without it
        return [Check("mean dice", "0.5", "at least 0.999", False)]

    with pytest.raises(VersionRefused, match=r"version \d+ is refused, version \d+ serves on: mean dice: 0\.5"):
        verify(bench.desk(), version, trial, tell=tables.append)
    assert not tables[0].go
    assert "NO-GO" in tables[0].as_text()
    assert version not in bench.control.served().loaded
    assert version not in bench.control.served().pinned
    assert state_of(bench, version) == "staged"


def test_a_plain_server_keeps_its_version_while_the_first_candidate_is_tried(bench: Bench, tmp_path: Path) -> None:
    """A server that took the newest version serves the old one on while a newer is loaded, tried, and kept."""
    repository = versioned.build_repository(Path(__file__).parents[3] / "model_repository", tmp_path / "plain")
    calibration = {"probability_threshold": 0.9, "min_lesion_pixels": NEVER}
    file = versioned.candidate(tmp_path / "candidate", probe_network.unet(NEVER), calibration=calibration)
    rows = scan_rows(b"", [0], [True])
    heard: list[tuple[str, bool]] = []
    with (
        EmbeddedTriton(ServeSettings(repository, control="explicit")) as server,
        ServerControl(server.grpc_address) as control,
    ):
        assert not control.served().by_name

        def on_step(step: str) -> None:
            heard.append((step, bool(infer(server.grpc_address, "ct_scan", rows)["SLICE_POSITIVE"].all())))

        desk = Desk(VersionFolder(repository), Journal(repository), [control], on_step)
        version = stage(desk, [file], new_thresholds=True)

        def trial(candidate: Candidate) -> list[Check]:
            on_step("trial")
            return []

        verify(desk, version, trial, new_thresholds=True)
        assert control.served().loaded == (1, version)
        assert all(positive for _, positive in heard), heard
        assert any(step == "trial" for step, _ in heard)
        promote(desk, version, NO_WATCH)
        assert not infer(server.grpc_address, "ct_scan", rows)["SLICE_POSITIVE"].any()


def test_a_plan_for_another_gpu_or_tensorrt_is_refused(tmp_path: Path) -> None:
    """Where the live version is a plan, a candidate for another runtime, version or GPU is named as that."""
    target = {"runtime": "tensorrt", "version": "10.16.0", "compute_capabilities": ["9.0"]}
    live = {"model.plan": read_manifest(versioned.describe(_plan(tmp_path / "live"), target=target))}
    for other, fits in (
        (target, True),
        ({**target, "compute_capabilities": ["8.9"]}, False),
        ({**target, "compute_capabilities": ["8.0"], "hardware_compatibility": "ampere_plus"}, True),
        ({**target, "version": "11.1.0"}, False),
        ({**target, "version": "10.12.0", "version_compatible": True}, True),
        ({**target, "runtime": "tensorrt_rtx"}, False),
    ):
        file = versioned.describe(_plan(tmp_path / "candidate"), target=other)
        (built_for,) = (check for check in check_files([file], live) if "built for" in check.what)
        assert built_for.passed == fits, other


def test_a_version_that_fails_under_load_is_rolled_back_by_itself(bench: Bench) -> None:
    """Its probe is answered, but a client's slices make it fail: the version before is live again, with the reason."""
    before = bench.control.served().live
    version = bench.verified(versioned.fragile_unet())
    hu = np.full((2, 32, 32), 3_000, dtype=np.int16)

    def provoke(step: str) -> None:
        if "watch" in step:
            for _ in range(4):
                with pytest.raises(Exception, match=r"(?i)gather|indices|out of"):
                    infer(
                        bench.server.grpc_address,
                        contract.CT_SCAN.name,
                        {**scan_rows(b"", [0, 1], [True, True]), contract.HU.name: hu},
                    )

    with pytest.raises(VersionRefused, match=rf"version {version} was rolled back, {before} is live again: .* failed"):
        promote(bench.desk(provoke), version, Watch(seconds=5.0))
    assert bench.control.served().live == before
    assert bench.desk().live() == before
    assert bench.desk().journal.records()[-1].outcome == "refused"


def test_a_version_that_was_changed_after_its_verification_is_not_promoted(bench: Bench) -> None:
    """The digest of what was verified is in the journal; another file by that name is refused."""
    version = bench.verified()
    file = bench.repository / "unet" / str(version) / "model.onnx"
    whole = file.read_bytes()
    with file.open("ab") as stream:
        stream.write(b"\0")
    try:
        assert any(f"version {version}: " in problem for problem in status(bench.desk()).problems)
        with pytest.raises(VersionRefused, match="its files changed since"):
            promote(bench.desk(), version, NO_WATCH)
    finally:
        file.write_bytes(whole)


def test_steps_that_make_no_sense_are_refused(bench: Bench) -> None:
    """No such version, the live one, none before, none loaded: each with its reason, and nothing done."""
    desk = bench.desk()
    live = desk.live()
    for refused, words in (
        (lambda: verify(desk, 999, trusting), "there is no version 999"),
        (lambda: promote(desk, 999, NO_WATCH), "there is no version 999"),
        (lambda: retire(desk, 999), "there is no version 999"),
        (lambda: verify(desk, live, trusting), "is live"),
        (lambda: retire(desk, live), "is live"),
        (lambda: rollback(desk, 999), "is not loaded any more"),
        (lambda: verify(replace(desk, servers=()), 999, trusting), "a server is needed"),
    ):
        with pytest.raises(VersionRefused, match=words):
            refused()
    assert bench.control.served().live == live


def test_one_command_at_a_time(bench: Bench) -> None:
    """A second command is refused, and told who is at work."""
    version = bench.staged()

    def trial(candidate: Candidate) -> list[Check]:
        with pytest.raises(VersionRefused, match=r"another command works on its versions \(process \d+ on "):
            retire(bench.desk(), version)
        return []

    verify(bench.desk(), version, trial)


def test_a_server_without_explicit_control_is_refused(bench: Bench, tmp_path: Path) -> None:
    """The reason says how to start it; the version stays staged."""
    repository = Path(shutil.copytree(bench.repository, tmp_path / "repository"))
    with (
        EmbeddedTriton(ServeSettings(repository)) as server,
        ServerControl(server.grpc_address) as control,
    ):
        desk = replace(bench.desk(), folder=VersionFolder(repository), servers=[control])
        desk = replace(desk, journal=type(desk.journal)(repository))
        version = stage(desk, [versioned.candidate(tmp_path / "candidate")])
        with pytest.raises(ServerRefused, match="--model-control-mode=explicit"):
            verify(desk, version, trusting)
        assert next(item.state for item in status(desk).versions if item.version == version) == State.STAGED.value


def test_a_server_that_asks_for_a_key_is_given_it(bench: Bench, tmp_path: Path) -> None:
    """Without the key, or with a wrong one, nothing is done and the header is named; with it versions are swapped."""
    repository = Path(shutil.copytree(bench.repository, tmp_path / "repository"))
    key = ("--grpc-restricted-protocol=model-repository:admin=secret",)
    settings = ServeSettings(repository, control="explicit", arguments=key)
    header = "triton-grpc-protocol-admin"
    with EmbeddedTriton(settings) as server:
        for headers in ({}, {header: "guessed"}):
            with ServerControl(server.grpc_address, headers) as control:
                for refused in (control.served, lambda: control.load("ct_scan"), lambda: control.unload("ct_scan")):
                    with pytest.raises(ServerRefused, match=f"--control-header {header}=VALUE"):
                        refused()
        with ServerControl(server.grpc_address, {header: "secret"}) as control:
            desk = replace(bench.desk(), folder=VersionFolder(repository), servers=[control])
            desk = replace(desk, journal=type(desk.journal)(repository))
            version = stage(desk, [versioned.candidate(tmp_path / "candidate")])
            verify(desk, version, trusting)
            promote(desk, version, NO_WATCH)
            assert control.served().live == version


def test_a_server_that_is_away_is_said_to_be(bench: Bench) -> None:
    """Status tells it and the versions by the files; what needs the server fails before anything is changed."""
    with ServerControl("127.0.0.1:1") as absent:
        desk = replace(bench.desk(), servers=[absent])
        found = status(desk)
        assert found.servers[0].served is None
        assert "127.0.0.1:1" in found.problems[0]
        with pytest.raises(ServerUnreachable):
            promote(desk, desk.live(), NO_WATCH)


def _plan(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "model.plan"
    file.write_bytes(b"plan")
    return file
