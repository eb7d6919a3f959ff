"""kill -9 at every step: the repository loads, status tells the truth, and the next command completes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import versioned
from calls import infer, scan_rows
from groundglass import contract
from groundglass.errors import GroundglassError
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from groundglass_ensemble.repository import find_problems
from groundglass_ensemble.versions import (
    Desk,
    Journal,
    ServerControl,
    VersionFolder,
    Watch,
    promote,
    retire,
    rollback,
    stage,
    status,
    verify,
)
from versioned import Bench, trusting

pytestmark = [pytest.mark.triton, pytest.mark.slow]
SCRIPT = Path(__file__).parents[2] / "kill_at.py"
NO_WATCH = Watch(seconds=0.0)
STEPS_AT_MOST = 30


def killed_at(
    repository: Path, address: str, step: int, command: str, version: int, file: Path | str = ""
) -> str | None:
    """Where the command was killed, None when it came to its end before that step."""
    arguments = [repository, address, step, command, version, file]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode == 0:
        return None
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout.strip()


def truth(bench: Bench) -> None:
    """What ``status`` says of files and server is what they are; a command without an end is said to have none."""
    found = status(bench.desk())
    served = bench.control.served()
    assert found.servers[0].served == served
    live = infer(bench.server.grpc_address, contract.CT_SCAN.name, scan_rows(b"", [0], [True]))
    assert live["SLICE_POSITIVE"].all()
    (by_files,) = [item.version for item in found.versions if item.state == "live"]
    folder = bench.desk().folder
    told = (served.live, served.loaded, served.by_name)
    differs = folder.live() is not None and told != (by_files, folder.loaded(), True)
    assert any("does not serve what the files say" in problem for problem in found.problems) or not differs
    pending = bench.desk().journal.pending()
    assert any("has no end" in problem for problem in found.problems) == (pending is not None)
    for item in found.versions:
        if item.state == "verified":
            assert item.version in (folder.loaded() or ())
        if item.state == "staged":
            assert item.version not in (folder.loaded() or ())


class Starts:
    """A second server on a copy of the repository, once for every state that a crash left behind."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._seen: set[str] = set()

    def check(self, repository: Path) -> None:
        """Start from the repository as it is, unless a start from such a one was seen."""
        assert find_problems(repository, "cpu") == []
        key = "\n".join(sorted((*_configs(repository), *map(str, repository.glob("*/building")))))
        if key in self._seen:
            return
        self._seen.add(key)
        copy = Path(shutil.copytree(repository, self._scratch / f"copy-{len(self._seen)}"))
        with EmbeddedTriton(ServeSettings(copy, control="explicit")) as server:
            assert infer(server.grpc_address, contract.CT_SCAN.name, scan_rows(b"", [0], [True]))[
                "SLICE_POSITIVE"
            ].all()


def _configs(repository: Path) -> Iterator[str]:
    """Every config, with versions called by their order: what a start depends on."""
    loaded = VersionFolder(repository).loaded() or ()

    def order(found: re.Match[str]) -> str:
        return str(loaded.index(int(found[0]))) if int(found[0]) in loaded else found[0]

    for path in repository.rglob("*.pbtxt"):
        text = f"{path.relative_to(repository)}: {path.read_text()}"
        yield re.sub(r"(?<=ct_scan_v)\d+|(?<=model_version: )\d+|(?<=versions: \[ ).*(?= \])", _each(order), text)


def _each(order: Callable[[re.Match[str]], str]) -> Callable[[re.Match[str]], str]:
    return lambda found: re.sub(r"\d+", order, found[0])


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Starts:
    """Shared: what was started from once is not started from again."""
    return Starts(tmp_path_factory.mktemp("starts"))


def crash_everywhere(bench: Bench, starts: Starts, command: str, prepare: Callable[[], int], file: str = "") -> int:
    """Kill ``command`` at each of its steps, prepared anew each time, and look; returns the number of steps."""
    for step in range(STEPS_AT_MOST):
        version = prepare()
        where = killed_at(bench.repository, bench.server.grpc_address, step, command, version, file)
        truth(bench)
        starts.check(bench.repository)
        if where is None:
            return step
    raise AssertionError(f"{command} has more than {STEPS_AT_MOST} steps")


def test_staging_is_killed_at_every_step(bench: Bench, starts: Starts, tmp_path: Path) -> None:
    """The version is there whole or not at all; the next staging succeeds."""
    file = versioned.candidate(tmp_path / "candidate")

    def prepare() -> int:
        return bench.desk().free_version()

    assert crash_everywhere(bench, starts, "stage", prepare, str(file)) >= 3
    assert stage(bench.desk(), [file]) in bench.desk().folder.versions()
    assert not list(bench.repository.glob("*/building"))


def test_verifying_is_killed_at_every_step(bench: Bench, starts: Starts) -> None:
    """The live version serves on; the next verification succeeds, and the one after promotes."""
    version = bench.staged()

    def prepare() -> int:
        if version in (bench.desk().folder.loaded() or ()):
            retire(bench.desk(), version, drain_s=0.0)
        return version

    assert crash_everywhere(bench, starts, "verify", prepare) >= 8
    assert verify(bench.desk(), version, trusting).go
    assert status(bench.desk()).problems == ()


def test_promoting_is_killed_at_every_step(bench: Bench, starts: Starts) -> None:
    """Either version is live and answers; the next promotion completes."""
    version = bench.verified()
    before = bench.desk().live()

    def prepare() -> int:
        if bench.desk().live() == version:
            rollback(bench.desk(), before)
        return version

    assert crash_everywhere(bench, starts, "promote", prepare) >= 5
    rollback(bench.desk(), before)
    killed_at(bench.repository, bench.server.grpc_address, 4, "promote", version)
    promote(bench.desk(), version, NO_WATCH)
    assert bench.control.served().live == bench.desk().live() == version
    assert status(bench.desk()).problems == ()
    rollback(bench.desk(), before)


def test_rolling_back_is_killed_at_every_step(bench: Bench, starts: Starts) -> None:
    """Once it was announced, the next command completes it, whatever that is."""
    version = bench.verified()
    before = bench.desk().live()

    def prepare() -> int:
        promote(bench.desk(), version, NO_WATCH)
        return before

    assert crash_everywhere(bench, starts, "rollback", prepare) >= 3
    promote(bench.desk(), version, NO_WATCH)
    assert killed_at(bench.repository, bench.server.grpc_address, 1, "rollback", before) is not None
    bench.staged()
    assert bench.control.served().live == bench.desk().live() == before


def test_retiring_is_killed_at_every_step(bench: Bench, starts: Starts) -> None:
    """The version is loaded or gone, never half; the next command completes it."""
    version = bench.staged()

    def prepare() -> int:
        if version not in (bench.desk().folder.loaded() or ()):
            verify(bench.desk(), version, trusting)
        return version

    assert crash_everywhere(bench, starts, "retire", prepare) >= 5
    assert killed_at(bench.repository, bench.server.grpc_address, 1, "delete", version) is not None
    bench.staged()
    assert version not in bench.desk().folder.versions()
    assert status(bench.desk()).problems == ()


def test_the_first_staging_of_a_plain_repository_is_killed_at_every_step(starts: Starts, tmp_path: Path) -> None:
    """A repository that named no version names one, or none yet; either way it loads, and the next staging succeeds."""
    plain = versioned.build_repository(Path(__file__).parents[3] / "model_repository", tmp_path / "plain")
    file = versioned.candidate(tmp_path / "candidate")
    for step in range(STEPS_AT_MOST):
        repository = Path(shutil.copytree(plain, tmp_path / f"plain-{step}"))
        where = killed_at(repository, "-", step, "stage", 2, file)
        starts.check(repository)
        desk = Desk(VersionFolder(repository), Journal(repository))
        status(desk)
        assert stage(desk, [file]) >= 2
        assert (desk.folder.live(), desk.folder.loaded(), desk.folder.pinned()) == (1, (1,), (1,))
        if where is None:
            assert step >= 4
            return
    raise AssertionError("it never came to its end")


def test_a_server_that_is_killed_during_a_load(bench: Bench, tmp_path: Path) -> None:
    """The command fails in one line; a server started anew serves the live version, and the same command completes."""
    repository = Path(shutil.copytree(bench.repository, tmp_path / "repository"))
    folder, journal = VersionFolder(repository), Journal(repository)
    version = stage(Desk(folder, journal), [versioned.candidate(tmp_path / "candidate")])
    with EmbeddedTriton(ServeSettings(repository, control="explicit")) as server:
        with ServerControl(server.grpc_address) as control:

            def kill_soon(step: str) -> None:
                if "load it beside" in step:
                    threading.Timer(0.3, os.kill, (server.pid, signal.SIGKILL)).start()

            with pytest.raises(GroundglassError) as failure:
                verify(Desk(folder, journal, [control], kill_soon), version, trusting)
            assert "\n" not in str(failure.value)
            found = status(Desk(folder, journal, [control]))
            assert found.servers[0].served is None
            assert next(item.state for item in found.versions if item.version == version) == "staged"
        while server.running:
            time.sleep(0.05)
    with (
        EmbeddedTriton(ServeSettings(repository, control="explicit")) as server,
        ServerControl(server.grpc_address) as control,
    ):
        desk = Desk(folder, journal, [control])
        assert control.served().live == desk.live()
        assert verify(desk, version, trusting).go
        promote(desk, version, NO_WATCH)
        assert status(desk).problems == ()
        # And a server that comes back after a promotion serves what was promoted.
        os.kill(server.pid, signal.SIGKILL)
        while server.running:
            time.sleep(0.05)
    with (
        EmbeddedTriton(ServeSettings(repository, control="explicit")) as server,
        ServerControl(server.grpc_address) as control,
    ):
        assert control.served().live == version
        assert status(replace(desk, servers=[control])).problems == ()
