"""The servers that scenarios call: the user's, or embedded ones that live as long as a block."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import MAX_BATCH
from groundglass.errors import ServerUnreachable, SettingError
from groundglass_bench.networks import CONFIG_NAME, near_free_repository, waiting_repository
from groundglass_client.connection import connect
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings

RunNetwork = Callable[[NDArray[np.int16]], object]
"""Runs preprocess and network on int16 (n, 512, 512) HU in this process, done when it returns."""

BareEngine = Callable[[float], float]
"""Runs the bare engine for about so many seconds. Returns slices a second."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all scenarios of a run share.

    repository, config_name: what is served where no network is put in its place.
    server: the user's, HOST:PORT; None to boot embedded ones.
    study: the user's, in place of the phantom.
    scratch: a folder that goes with the run.
    threads: of the machine.
    open_torch: opens the real network in eager torch; raises where it can't.
    open_plan: opens a TensorRT plan on this machine's GPU: ways to run it bare, by name.
    tell: says what is going on.
    """

    repository: Path
    config_name: str | None
    server: str | None
    study: Path | None
    scratch: Path
    open_torch: Callable[[], RunNetwork]
    open_plan: Callable[[Path], Mapping[str, BareEngine]]
    tell: Callable[[str], None]

    @property
    def threads(self) -> int:
        """Processors that this process may use."""
        return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its gRPC and HTTP addresses, and the leader of its processes; the user's has the first only."""

    grpc: str
    http: str = ""
    pid: int = 0


@contextmanager
def real_server(around: Surroundings) -> Iterator[Server]:
    """The user's server, or an embedded one on the repository as it is."""
    if around.server is not None:
        yield Server(around.server)
        return
    with _embedded(around.repository, around.config_name) as server:
        yield server


@contextmanager
def near_free_server(around: Surroundings, max_batch: int = MAX_BATCH) -> Iterator[Server]:
    """An embedded server with the near-free network; a request may carry ``max_batch`` rows."""
    with (
        _repository(around, lambda target: near_free_repository(around.repository, target, max_batch)) as repository,
        _embedded(repository, CONFIG_NAME) as server,
    ):
        yield server


@contextmanager
def swappable_server(around: Surroundings) -> Iterator[tuple[Server, Path]]:
    """An embedded server with the near-free network whose versions can be swapped, and its repository."""
    with (
        _repository(around, lambda target: near_free_repository(around.repository, target)) as repository,
        _embedded(repository, CONFIG_NAME, control="explicit") as server,
    ):
        yield server, repository


@contextmanager
def waiting_server(around: Surroundings, slice_ms: float, rows: int, instances: int = 1) -> Iterator[Server]:
    """An embedded server whose network waits ``slice_ms`` for each slice, in each of its ``instances``, and takes
    requests of ``rows`` slices one by one.
    """
    with (
        _repository(
            around, lambda target: waiting_repository(around.repository, target, slice_ms, rows, instances)
        ) as repository,
        _embedded(repository, CONFIG_NAME) as server,
    ):
        yield server


@contextmanager
def near_free_or_given(around: Surroundings) -> Iterator[Server]:
    """The user's server if there is one, else an embedded one with the near-free network."""
    with real_server(around) if around.server is not None else near_free_server(around) as server:
        yield server


def require_answer(server: str, timeout_s: float) -> None:
    """Raise ServerUnreachable or ServerRefused, with one line, when no such server answers at ``server``."""
    with connect(server, shared_memory=False) as transport:
        try:
            transport.describe(timeout_s)
        except ServerUnreachable as error:
            raise ServerUnreachable(f"no server answers at {server}: {error}") from error


def newest_file(repository: Path, model: str, name: str) -> Path:
    """The file ``name`` of a model's newest version. Raises SettingError when there is none."""
    versions = [path.parent for path in (repository / model).glob(f"*/{name}") if path.parent.name.isdecimal()]
    if not versions:
        raise SettingError(f"{repository / model} has no version with a file {name}")
    return max(versions, key=lambda version: int(version.name)) / name


@contextmanager
def _repository(around: Surroundings, build: Callable[[Path], Any]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="repository-", dir=around.scratch) as folder:
        repository = Path(folder) / "model_repository"
        build(repository)
        yield repository


@contextmanager
def _embedded(
    repository: Path, config_name: str | None, control: Literal["none", "explicit"] = "none"
) -> Iterator[Server]:
    with EmbeddedTriton(ServeSettings(repository, config_name, control=control)) as triton:
        yield Server(triton.grpc_address, triton.http_address, triton.pid)
