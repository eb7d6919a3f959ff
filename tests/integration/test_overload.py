"""A server with more to do than it can: its queue is bounded, clients come back later, and the verdicts are right."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from client_study import study_of
from groundglass.errors import ServerUnreachable
from groundglass_bench.networks import waiting_repository
from groundglass_client.connection import connect
from groundglass_client.session import ScanAnalysis, SessionSettings, analyse
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from groundglass_ensemble.repository import config_file, read_config
from probe_network import slices

pytestmark = pytest.mark.triton

REPOSITORY = Path(__file__).parents[2] / "model_repository"
SIDE, ROWS, QUEUE = 64, 4, 3
HOW = SessionSettings(chunk_bytes=ROWS * SIDE * SIDE * 2, window=4)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedTriton]:
    """A server whose network takes 40 ms for a request and lets three wait."""
    target = tmp_path_factory.mktemp("waiting") / "repository"
    waiting_repository(REPOSITORY, target, 10.0, ROWS)
    file = config_file(target / "unet", "cpu")
    text, changed = re.subn(r"max_queue_size: \d+", f"max_queue_size: {QUEUE}", file.read_text())
    assert changed == 1
    file.write_text(text)
    with EmbeddedTriton(ServeSettings(target)) as started:
        yield started


def sent(server: EmbeddedTriton, how: SessionSettings) -> ScanAnalysis:
    """A study of forty slices, from a client of its own."""
    hu = slices([True], SIDE)[0]
    with connect(server.grpc_address) as transport:
        return analyse(study_of(40, SIDE), transport, lambda source: hu, how)


def test_the_queue_of_the_shipped_network_is_bounded() -> None:
    """Both configurations of unet bound what may wait."""
    for name in (None, "cpu"):
        config = read_config(config_file(REPOSITORY / "unet", name))
        assert config.dynamic_batching.default_queue_policy.max_queue_size == 128


def test_clients_that_are_turned_away_come_back(server: EmbeddedTriton) -> None:
    """Five clients with twenty requests at once on a queue of three: all five get their verdict, after repetitions."""
    with ThreadPoolExecutor(5) as clients:
        found = list(clients.map(lambda number: sent(server, HOW), range(5)))
    assert [analysis.report.longest_run for analysis in found] == [40] * 5
    requests = sum(span.attempts for analysis in found for span in analysis.spans)
    assert requests > 5 * 10


def test_an_overload_that_outlasts_the_patience_is_a_clear_error(server: EmbeddedTriton) -> None:
    """A client that may not wait for long is told that the queue is full, and the server is well afterwards."""
    hasty = replace(HOW, recovery_s=0.0)
    with ThreadPoolExecutor(5) as clients:
        running = [clients.submit(sent, server, hasty) for _ in range(5)]
        errors = [error for future in running if (error := future.exception())]
    assert errors
    assert all(isinstance(error, ServerUnreachable) for error in errors)
    assert "maximum queue size" in str(errors[0])
    assert sent(server, HOW).report.longest_run == 40
