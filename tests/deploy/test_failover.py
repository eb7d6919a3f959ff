"""Whole studies through the balancer while servers are killed and restarted under it."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from balancer import Balancer, deployment
from groundglass import contract
from groundglass.study import Study
from groundglass.tls import TlsSettings
from groundglass_client.buffers import Buffers
from groundglass_client.connection import connect
from groundglass_client.intake import decode_hu, open_study
from groundglass_client.phantom import PhantomSettings, write_phantom
from groundglass_client.requests import Request, Tensors
from groundglass_client.session import ScanAnalysis, SessionSettings, analyse
from groundglass_client.transport import ServedScan, Transport
from groundglass_ensemble.embedded import EmbeddedTriton
from probe_network import build_repository, unet
from waiting import wait_until

pytestmark = [pytest.mark.triton, pytest.mark.slow]

MODELS = Path(__file__).parents[2] / "model_repository"
KILLS = int(os.environ.get("GROUNDGLASS_KILLS", "3"))
"""Studies during which a server is killed; the figures in docs/operations.md are of 20."""

SLICES, SIDE = 1000, int(os.environ.get("GROUNDGLASS_SIDE", "128"))
POSITIVE_PIXELS = 35_700
"""Of the probe network, which marks bone and vessels: some slices of the phantom have as many, most have not."""

SETTINGS = SessionSettings(chunk_bytes=8 * SIDE * SIDE * 2)


class Passing:
    """A transport that hands everything on."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        """See Transport."""
        return self._inner.send(request, timeout_s)

    def describe(self, timeout_s: float) -> ServedScan:
        """See Transport."""
        return self._inner.describe(timeout_s)

    def buffers(self) -> Buffers:
        """See Transport."""
        return self._inner.buffers()


class Nameless(Passing):
    """A transport to servers where no version can be asked for by name."""

    def describe(self, timeout_s: float) -> ServedScan:
        """See Transport."""
        return replace(super().describe(timeout_s), pinned=frozenset())


class Watched(Passing):
    """A transport that notes which chunks were sent how often, and whether one was sent though its answer had come."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self.sent: Counter[int] = Counter()
        self.answered: set[int] = set()
        self.sent_though_answered = 0

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        """See Transport."""
        future = super().send(request, timeout_s)
        if request.model is not contract.SCAN_AGGREGATOR:
            chunk = int(request.tensors[contract.SLICE_INDEX.name][0, 0])
            self.sent[chunk] += 1
            self.sent_though_answered += chunk in self.answered
            future.add_done_callback(lambda done: self.answered.add(chunk) if done.exception() is None else None)
        return future

    def sent_again(self) -> int:
        """Chunks that were sent more than once."""
        return sum(times > 1 for times in self.sent.values())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A thousand slices of a phantom, as DICOM."""
    folder = tmp_path_factory.mktemp("phantom") / "scan"
    write_phantom(PhantomSettings(slices=SLICES, lesion=(300, 600), rows=SIDE, columns=SIDE), folder)
    with open_study(folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Balancer, list[EmbeddedTriton]]]:
    """Two servers behind the balancer."""
    folder = tmp_path_factory.mktemp("failover")
    repository = build_repository(MODELS, folder / "repository")
    live = (repository / "ct_scan" / "config.pbtxt").read_text()
    (repository / "ct_scan_v1" / "1").mkdir(parents=True)
    (repository / "ct_scan_v1" / "config.pbtxt").write_text(live.replace('"ct_scan"', '"ct_scan_v1"'))
    (repository / "ct_scan_v1" / "1" / "README.md").touch()
    onnx.save(unet(POSITIVE_PIXELS), repository / "unet" / "1" / "model.onnx")
    with deployment(repository, folder) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(study: Study, stack: tuple[Balancer, list[EmbeddedTriton]]) -> ScanAnalysis:
    """What one server says of the study, asked directly."""
    with connect(stack[1][0].grpc_address, shared_memory=False) as transport:
        return analyse(study, transport, decode_hu, SETTINGS)


def answered_slices(server: EmbeddedTriton) -> int:
    """Slices that a server answered through the ensemble since it started."""
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(server.grpc_address) as client:
        statistics = client.get_inference_statistics()
    return sum(
        int(model.inference_count) for model in statistics.model_stats if model.name.startswith(contract.CT_SCAN.name)
    )


def assert_same(found: ScanAnalysis, expected: ScanAnalysis) -> None:
    """Every slice, every mask and the verdict."""
    assert found.report.slices == expected.report.slices
    assert (found.report.longest_run, found.report.scan_positive) == (
        expected.report.longest_run,
        expected.report.scan_positive,
    )
    assert found.masks is not None
    assert expected.masks is not None
    np.testing.assert_array_equal(found.masks, expected.masks)


def test_a_study_is_spread_over_the_servers(
    study: Study, stack: tuple[Balancer, list[EmbeddedTriton]], undisturbed: ScanAnalysis
) -> None:
    """A thousand slices over TLS are answered by both servers, and the report is that of one."""
    balancer, servers = stack
    before = [answered_slices(server) for server in servers]
    with connect(balancer.grpc_address, tls=TlsSettings(ca=balancer.certificates.ca)) as transport:
        found = analyse(study, transport, decode_hu, SETTINGS)
    shares = [answered_slices(server) - then for server, then in zip(servers, before, strict=True)]
    assert abs(sum(shares) - SLICES) <= 8  # the last chunk of a study is counted after it is answered
    assert min(shares) > SLICES // 5
    assert_same(found, undisturbed)
    verdicts = [result.positive for result in found.report.slices]
    assert 100 < sum(verdicts) < 900
    assert found.report.scan_positive


def killer(victim: EmbeddedTriton, kill_at: int) -> Callable[[int], None]:
    """Told of every slice that is answered, it kills a server's process at one of them."""
    answered = 0

    def on_slices(count: int) -> None:
        nonlocal answered
        if answered < kill_at <= answered + count:
            os.kill(victim.pid, signal.SIGKILL)
        answered += count

    return on_slices


def test_a_server_is_killed_in_the_middle(
    study: Study, stack: tuple[Balancer, list[EmbeddedTriton]], undisturbed: ScanAnalysis
) -> None:
    """kill -9 of a server while it computes: no error, the same report, and only unanswered chunks are sent again."""
    balancer, servers = stack
    draw = np.random.default_rng(0)
    figures = []
    with connect(balancer.grpc_address, tls=TlsSettings(ca=balancer.certificates.ca)) as transport:
        for victim, kill_at in zip(servers * KILLS, draw.integers(100, 900, KILLS).tolist(), strict=False):
            watched = Watched(Nameless(transport))
            found = analyse(study, watched, decode_hu, SETTINGS, killer(victim, kill_at))
            assert_same(found, undisturbed)
            assert watched.sent_though_answered == 0
            # Those in flight, and at most as many that reached the dying server's socket after them.
            assert watched.sent_again() <= 2 * SETTINGS.window
            figures.append({"killed_after_slices": kill_at, "chunks_sent_again": watched.sent_again()})
            victim.stop()
            victim.start()
            balancer.await_replicas(2)
    assert any(figure["chunks_sent_again"] for figure in figures)
    print(json.dumps(figures))


def test_servers_restart_one_after_the_other(
    study: Study, stack: tuple[Balancer, list[EmbeddedTriton]], undisturbed: ScanAnalysis
) -> None:
    """A rolling restart fails no study of four clients, of which two ask for the version by name."""
    balancer, servers = stack
    over, done = threading.Event(), []

    def client(wrap: Callable[[Transport], Transport]) -> None:
        with connect(balancer.grpc_address, tls=TlsSettings(ca=balancer.certificates.ca)) as transport:
            while not over.is_set():
                assert_same(analyse(study, wrap(transport), decode_hu, SETTINGS), undisturbed)
                done.append(1)

    with ThreadPoolExecutor(4) as clients:
        running = [clients.submit(client, wrap) for wrap in (Nameless, Passing) * 2]
        try:
            for server in servers:
                server.stop()
                server.start()
                balancer.await_replicas(2)
                enough = len(done) + 2
                wait_until(
                    lambda enough=enough: len(done) >= enough or any(future.done() for future in running),
                    "studies",
                    120,
                )
        finally:
            over.set()
        for future in running:
            future.result()
