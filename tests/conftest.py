"""Shared fixtures: the real data, a repository of near-free models, a real server on it, and a guard against leaks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from groundglass_ensemble.keeper import SHARED_MEMORY
from probe_network import build_repository

PROJECT = Path(__file__).parents[1]
_SHARED_SERVER = pytest.StashKey[EmbeddedTriton]()


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
    left = {what for what in _leavings() - before if shared is None or not what.startswith(shared.shm_prefix)}
    left = (left - _others(left)) & _leavings()  # looked at again: others end meanwhile
    assert not left, f"left behind: {sorted(left)}"


def _others(names: set[str]) -> set[str]:
    """Those that a process maps which is none of ours: other servers and clients of this machine."""
    if not names:
        return names
    ours = {child.pid for child in psutil.Process().children(recursive=True)} | {os.getpid()}
    maps = []
    for process in psutil.process_iter():
        if process.pid not in ours:
            with suppress(OSError):
                maps.append(Path(f"/proc/{process.pid}/maps").read_text())
    return {name for name in names if any(name in text for text in maps)}


def _leavings() -> set[str]:
    """Shared memory of embedded servers, and every process whose command line names such memory."""
    found = {region.name for region in SHARED_MEMORY.glob("groundglass_*")}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            words = (word.rpartition("shm-region-prefix-name=")[2] for word in child.cmdline())
            found.update(f"{word} in process {child.pid}" for word in words if word.startswith("groundglass_"))
    return found
