"""Runs a load in processes of its own: locust patches the standard library, which no caller of ours should see."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from groundglass.errors import GroundglassError, MissingExtra, ServerError
from groundglass_bench.load.contact import check_server
from groundglass_bench.load.result import LoadResult, combine
from groundglass_bench.load.samples import Record, read_record
from groundglass_bench.load.settings import Load, arguments

LOCUSTFILE: Final = Path(__file__).with_name("locustfile.py")

_START_S: Final = 30.0
"""Longest time that locust may take to start, and again to end: seconds on a busy machine."""

_SPARE_S: Final = 2
"""Processes do not start at the same moment: each sends a little longer than what is measured."""

_SAMPLES: Final = "samples.json"
_GRACE_S: Final = 15.0
"""For a process to cut off its studies, have the server let go of its shared memory, and end."""

_POLL_S: Final = 0.05
_NOT_OURS: Final = ("LOCUST_", "GROUNDGLASS_TLS")
_MOST_SPAWNED_PER_S: Final = 100  # locust warns above it


def run_load(load: Load, server: str) -> LoadResult:
    """Put ``server``, HOST:PORT, under ``load``; returns when the last study has its report.

    Raises ServerUnreachable or ServerRefused before the load starts, MissingExtra without locust, and GroundglassError
    when the generator itself fails. Failed studies are part of the result. Nothing is left running, whatever happens.
    """
    if importlib.util.find_spec("locust") is None:
        raise MissingExtra("locust", "bench")
    check_server(server)
    with tempfile.TemporaryDirectory(prefix="groundglass-load-") as folder:
        records = _run(load, server, Path(folder))
    return combine(load, server, records)


def _run(load: Load, server: str, folder: Path) -> list[Record]:
    shares = [_share(load, process) for process in range(load.processes)]
    commands = [_command(share, server, process) for process, share in enumerate(shares)]
    folders = [folder / str(process) for process in range(load.processes)]
    limit_s = load.warm_up_s + load.duration_s + _SPARE_S + load.study_timeout_s + 2 * _START_S
    with _running(commands, folders) as started:
        _await(started, folders, limit_s)
    return [_record(process, place) for process, place in zip(started, folders, strict=True)]


def _share(load: Load, process: int) -> Load:
    """What one of the load's processes sends."""
    users = len(range(process, load.users, load.processes))
    part = users / load.users
    return replace(
        load,
        users=users,
        rate_per_s=None if load.rate_per_s is None else load.rate_per_s * part,
        max_in_flight=max(1, round(load.max_in_flight * part)),
        processes=1,
    )


def _command(load: Load, server: str, process: int) -> list[str]:
    seconds = math.ceil(load.warm_up_s + load.duration_s) + _SPARE_S
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", server),
        *("--users", str(load.users), "--spawn-rate", str(min(load.users, _MOST_SPAWNED_PER_S))),
        *("--run-time", f"{seconds}s", "--stop-timeout", str(math.ceil(load.study_timeout_s + _GRACE_S))),
        *("--only-summary", "--loglevel", "WARNING", "--exit-code-on-error", "0"),
        *("--samples", _SAMPLES, "--part", str(process)),
        *arguments(load),
    ]


@contextmanager
def _running(commands: Sequence[list[str]], folders: Sequence[Path]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes, each in a folder and a group of its own; none is left when the block ends."""
    # A person's LOCUST_... settings are not part of the load, nor what other servers ask for; nor is a locust.conf,
    # hence the folders.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command, folder in zip(commands, folders, strict=True):
            folder.mkdir()
            with (folder / "log").open("wb") as log:
                process = subprocess.Popen(  # noqa: S603
                    command,
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            started.append(process)
        yield started
    finally:
        _end(started)


def _await(started: Sequence[subprocess.Popen[bytes]], folders: Sequence[Path], limit_s: float) -> None:
    """Wait until every process has written its samples, or one ends without."""
    deadline_s = time.monotonic() + limit_s
    while not all((folder / _SAMPLES).exists() for folder in folders):
        if any(process.poll() is not None for process in started):
            return  # the last one wrote at this very moment, or has failed: see _record
        if time.monotonic() > deadline_s:
            raise GroundglassError(f"the load generator did not end within {limit_s:.0f} s")
        time.sleep(_POLL_S)


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes and all that they started, in order while there is time, then by force."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
        deadline_s = time.monotonic() + _GRACE_S
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline_s - time.monotonic()))


def _record(process: subprocess.Popen[bytes], folder: Path) -> Record:
    samples = folder / _SAMPLES
    if samples.exists():
        return read_record(samples)
    lines = [line for line in (folder / "log").read_text(errors="replace").splitlines() if line.strip()]
    ours = [line.removeprefix("groundglass: ") for line in lines if line.startswith("groundglass: ")]
    if ours:
        raise ServerError(ours[-1])
    last = lines[-1] if lines else "it said nothing"
    raise GroundglassError(f"the load generator ended with exit code {process.returncode}: {last}")
