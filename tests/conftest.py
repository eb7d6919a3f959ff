"""Shared fixtures: the real data, a repository of near-free models, a real server on it, and a guard against leaks."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from own_memory import regions
from probe_network import build_repository

PROJECT = Path(__file__).parents[1]
_SHARED_SERVER = pytest.StashKey[EmbeddedTriton]()
_OTHERS_TIDY_UP_S = 10.0
"""A server that another test worker killed leaves regions that no process maps, until its keeper has removed them."""


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real chest CT data; skips where it is absent."""
    root = Path(os.environ.get("GROUNDGLASS_DATA", PROJECT.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data at {root}: set GROUNDGLASS_DATA")
    return root


@pytest.fixture(scope="session")
def probe_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's model repository with the probe network in place of the real one. Shared: don't change it."""
    return build_repository(PROJECT / "model_repository", tmp_path_factory.mktemp("probe") / "repository")


@pytest.fixture(scope="session")
def fp32_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's model repository with the shipped checkpoint in FP32, the reference. Shared: don't change it."""
    from groundglass_export.onnx_export import export_onnx

    repository = tmp_path_factory.mktemp("fp32") / "repository"
    shutil.copytree(PROJECT / "model_repository", repository)
    export_onnx(PROJECT / "export" / "weights" / "groundglass_unet.safetensors", repository)
    return repository


@pytest.fixture(scope="session")
def probe_server(probe_repository: Path, pytestconfig: pytest.Config) -> Iterator[EmbeddedTriton]:
    """A real Triton that serves the probe network. Shared: don't stop it, and use study keys of your own."""
    with EmbeddedTriton(ServeSettings(probe_repository)) as server:
        pytestconfig.stash[_SHARED_SERVER] = server
        yield server


@pytest.fixture(autouse=True, scope="module")
def _no_leaks(pytestconfig: pytest.Config) -> Iterator[None]:
    """A module leaves no server process and no shared memory of a server behind, the shared server's excepted."""
    before = _leavings()
    yield
    shared = pytestconfig.stash.get(_SHARED_SERVER, None)

    def left() -> set[str]:
        return {what for what in _leavings() - before if shared is None or not what.startswith(shared.shm_prefix)}

    remaining, deadline = left(), time.monotonic() + _OTHERS_TIDY_UP_S
    while remaining and time.monotonic() < deadline:
        time.sleep(0.2)
        remaining &= left()
    assert not remaining, f"left behind: {sorted(remaining)}"


def _leavings() -> set[str]:
    """Shared memory of embedded servers, and every process whose command line names such memory."""
    found = regions("groundglass_")
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            words = (word.rpartition("shm-region-prefix-name=")[2] for word in child.cmdline())
            found.update(f"{word} in process {child.pid}" for word in words if word.startswith("groundglass_"))
    return found
