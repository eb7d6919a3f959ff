"""A real Triton under explicit control, on a repository of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import versioned
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from groundglass_ensemble.versions import ServerControl

MODEL_REPOSITORY = Path(__file__).parents[3] / "model_repository"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[versioned.Bench]:
    """Shared by the tests of a module: the live version stays a good one, and the server up."""
    repository = versioned.build_repository(MODEL_REPOSITORY, tmp_path_factory.mktemp("versions") / "repository")
    settings = ServeSettings(repository, control="explicit")
    with EmbeddedTriton(settings) as server, ServerControl(server.grpc_address) as control:
        yield versioned.Bench(repository, server, control, tmp_path_factory.mktemp("scratch"))
