"""`groundglass models` as an operator and a pipeline run it, against two real servers on one repository."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import probe_network
import versioned
from command import assert_one_clear_line, groundglass
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings

pytestmark = pytest.mark.triton
MODEL_REPOSITORY = Path(__file__).parents[2] / "model_repository"


@dataclass(frozen=True)
class Site:
    """One repository, and the servers that serve it."""

    repository: Path
    servers: str
    scratch: Path

    def models(self, *arguments: str | Path) -> Any:
        """Run a command of the group at this site."""
        served = () if arguments[0] == "history" else ("--server", self.servers)
        return groundglass("models", *arguments, "--repository", self.repository, *served)

    def told(self, *arguments: str | Path) -> Any:
        """What a command that succeeds says with --json."""
        done = self.models(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def staged(self, name: str, **candidate: Any) -> int:
        """A new version."""
        return int(self.told("stage", versioned.candidate(self.scratch / name, **candidate))["version"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two embedded servers, with golden answers of the probe network in the repository."""
    repository = versioned.build_repository(MODEL_REPOSITORY, tmp_path_factory.mktemp("site") / "repository")
    done = groundglass(
        *("export", "golden", "--model", repository / "unet" / "1" / "model.onnx"),
        *("--out", repository / "unet" / "golden.npz"),
    )
    assert done.returncode == 0, done.stderr
    settings = ServeSettings(repository, control="explicit")
    with EmbeddedTriton(settings) as one, EmbeddedTriton(settings) as other:
        yield Site(repository, f"{one.grpc_address},{other.grpc_address}", tmp_path_factory.mktemp("scratch"))


def test_a_version_is_swapped_on_both_servers(site: Site, tmp_path: Path) -> None:
    """Stage, verify, promote, roll back, retire, each told as JSON: both servers follow, and the journal has it all."""
    version = site.staged("good")
    found = site.told("verify", str(version), "--evidence", tmp_path / "evidence", "--latency-ratio", "100")
    assert found["go"]
    checks = [row["check"] for row in found["checks"]]
    for server in site.servers.split(","):
        assert f"{server}: golden study: mean dice" in checks
        assert f"{server}: latency of 4 slices" in checks
    assert (tmp_path / "evidence" / "parity.json").is_file()
    assert site.told("promote", str(version), "--watch-s", "0") == {"live": version, "rollback_target": 1}
    status = site.told("status", "--check")
    assert status["live"] == version
    assert [server["served"]["live"] for server in status["servers"]] == [version, version]
    assert [server["served"]["loaded"] for server in status["servers"]] == [[1, version], [1, version]]
    assert site.told("rollback") == {"live": 1, "rollback_target": version}
    assert site.told("retire", str(version), "--delete", "--drain-s", "0") == {"version": version, "state": "deleted"}
    journal = [(record["action"], record["outcome"]) for record in site.told("history")]
    done = ["stage", "verify", "promote", "rollback", "retire"]
    assert [action for action, outcome in journal if outcome == "done" and action != "adopt"][-5:] == done
    lines = site.models("history").stdout
    assert f"promote {version}: done" in lines
    assert "version 1: live" in site.models("status").stdout


@pytest.mark.parametrize(
    ("name", "candidate", "words"),
    [
        ("verdict", {"network": probe_network.unet(100_000)}, "lesion pixels that turn SLICE_POSITIVE"),
        ("broken", {"network": b"nothing"}, "does not load"),
        ("foreign", {"sources": ()}, "golden"),
    ],
)
def test_a_no_go_is_a_table_and_one_line(site: Site, name: str, candidate: dict[str, Any], words: str) -> None:
    """What decides otherwise than it says, does not load, or comes from elsewhere: exit code 1 and the reason."""
    if name == "foreign":
        candidate = {**candidate, "network": probe_network.unet(65), "calibration": versioned.CALIBRATION}
    version = site.staged(name, **candidate)
    done = site.models("verify", str(version), "--evidence", site.scratch / "evidence", "--json")
    assert done.returncode == 1
    assert not json.loads(done.stdout)["go"]
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"groundglass: version {version} is refused, version 1 serves on: ")
    assert words in line
    told = site.told("status", "--check")
    assert told["live"] == 1
    assert [server["served"]["loaded"] for server in told["servers"]] == [[1], [1]]


def test_a_refusal_is_one_line_and_json_where_asked(site: Site, tmp_path: Path) -> None:
    """Without --json stdout is empty; with it the reason stands there too. Both exit with 1."""
    assert_one_clear_line(site.models("promote", "99"), "there is no version 99")
    for command in ("promote", "verify", "retire"):
        done = site.models(command, "99", "--json")
        assert done.returncode == 1
        assert json.loads(done.stdout)["kind"] == "VersionRefused"
    other = {"probability_threshold": 0.5, "min_lesion_pixels": 64}
    file = versioned.candidate(tmp_path / "other", calibration=other)
    assert_one_clear_line(site.models("stage", file), "thresholds", "--new-thresholds")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("promote", "2", "--repository", "no/such"), "no/such is no model repository"),
        (("rollback", "--repository", MODEL_REPOSITORY, "--server", "nonsense=1"), "no version was live before"),
        (("status", "--repository", "no/such", "--server", "127.0.0.1:1", "--control-header", "key"), "KEY=VALUE"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: tuple[str | Path, ...], words: str, tmp_path: Path) -> None:
    """It names the setting or the folder."""
    if MODEL_REPOSITORY in arguments:
        copy = probe_network.build_repository(MODEL_REPOSITORY, tmp_path / "repository")
        arguments = tuple(copy if argument == MODEL_REPOSITORY else argument for argument in arguments)
    assert_one_clear_line(groundglass("models", *arguments), words)


def test_an_unknown_control_mode_is_one_clear_line(site: Site) -> None:
    """Serving names the setting and what it may be."""
    done = groundglass("serve", "--control", "poll", "--repository", site.repository)
    assert_one_clear_line(done, "--control poll", "none or explicit")


def test_a_server_alone_tells_its_status(site: Site, tmp_path: Path) -> None:
    """Without the repository, as from another machine, the servers say what they serve."""
    done = groundglass("models", "status", "--server", site.servers, "--repository", tmp_path / "none", "--json")
    assert done.returncode == 0, done.stderr
    assert [server["served"]["live"] for server in json.loads(done.stdout)["servers"]] == [1, 1]


def test_a_read_only_repository_is_named(site: Site, tmp_path: Path) -> None:
    """A file in the lock's place, as a repository that can't be written: one line, and nothing was done."""
    copy = Path(shutil.copytree(site.repository, tmp_path / "repository"))
    (copy / "versions.lock").unlink(missing_ok=True)
    (copy / "versions.lock").mkdir()
    file = versioned.candidate(tmp_path / "good")
    assert_one_clear_line(groundglass("models", "stage", file, "--repository", copy), "versions.lock can't be written")
