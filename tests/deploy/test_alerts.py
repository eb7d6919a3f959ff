"""Every alert is made to fire by its real cause: real servers, behind the real balancer, watched by a real Prometheus.

Rules and thresholds are the deployment's, only their times are short (tests/metrics_server.py). GpuMemoryFull is
missing: no server here sees a GPU. deploy/prometheus/tests/alerts.yml tries it on made-up series.

The tests depend on their order: what must end well comes first, what ends servers last.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from calls import infer, scan_rows
from client_study import QUICK, Decoder, study_of
from groundglass import contract
from groundglass.tls import TlsSettings
from groundglass_bench.networks import waiting_repository
from groundglass_client.connection import connect
from groundglass_client.session import analyse
from groundglass_ensemble.embedded import EmbeddedTriton
from metrics_server import Monitored, all_rules, monitored
from waiting import wait_until

pytestmark = pytest.mark.triton

REPOSITORY = Path(__file__).parents[2] / "model_repository"
CT_SCAN = contract.CT_SCAN.name
SLICE_MS, ROWS, AT_ONCE = 150.0, 4, 8
"""A request of four slices takes 0.6 s, and of eight at once the last waits for more than four seconds."""
MANY_ROWS = 64
"""A request of so many takes ten seconds, in which nobody gets an answer: longer than the alert waits here."""
KEPT_STUDIES = 3
PAUSE_S = 0.05
PROVOKED: set[str] = set()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, probe_repository: Path) -> Iterator[Monitored]:
    """A server with room for three studies and one with a slow network, their balancer, and Prometheus."""
    folder = tmp_path_factory.mktemp("watched")
    small = Path(shutil.copytree(probe_repository, folder / "small"))
    config = small / contract.SCAN_AGGREGATOR.name / "config.pbtxt"
    parameter = r'(key: "max_studies" value: { string_value: )"\d+"'
    text, changed = re.subn(parameter, rf'\1"{KEPT_STUDIES}"', config.read_text())
    assert changed == 1
    config.write_text(text)
    slow = waiting_repository(REPOSITORY, folder / "slow", SLICE_MS, ROWS)
    with monitored(folder, [small, slow]) as running:
        yield running


@contextmanager
def repeated(call: Callable[[], object], at_once: int = 1) -> Iterator[None]:
    """Do ``call`` over and over beside the block, in some threads; what a server refuses doesn't end it."""
    done = Event()

    def again() -> None:
        while not done.wait(PAUSE_S):
            with suppress(InferenceServerException):
                call()

    with ThreadPoolExecutor(at_once) as threads:
        running = [threads.submit(again) for _ in range(at_once)]
        try:
            yield
        finally:
            done.set()
    for thread in running:
        thread.result()


def provoked(watched: Monitored, name: str, **labels: str) -> None:
    """Wait until an alert fires."""
    watched.prometheus.await_firing(name, **labels)
    PROVOKED.add(name)


def contradiction(server: EmbeddedTriton) -> None:
    """A request that the last stage refuses: one study with two slice counts."""
    counts = {contract.SLICE_COUNT.name: np.array([[3], [4]], np.int32)}
    infer(server.grpc_address, CT_SCAN, scan_rows(b"contradicted", [0, 1], [True] * 4) | counts)


def abandoned_study(server: EmbeddedTriton) -> None:
    """The first slices of a study whose others never come."""
    infer(server.grpc_address, CT_SCAN, scan_rows(uuid.uuid4().hex.encode(), [0, 1], [True] * 4))


def request_of_no_study(server: EmbeddedTriton, rows: int) -> None:
    """Slices that the last stage keeps nothing of."""
    infer(server.grpc_address, CT_SCAN, scan_rows(contract.PROBE_STUDY, [0] * rows, [True]))


def request_through(watched: Monitored) -> None:
    """A question to any replica, through the balancer."""
    options = TlsSettings(ca=watched.balancer.certificates.ca).client_options()
    with triton.InferenceServerClient(watched.balancer.grpc_address, **options) as client:
        client.is_server_ready(client_timeout=5)


def test_a_study_that_ends_well_alarms_nobody(watched: Monitored) -> None:
    """A study through the balancer, spread over both replicas, fires no alert."""
    front = watched.balancer
    with connect(front.grpc_address, tls=TlsSettings(ca=front.certificates.ca)) as transport:
        analyse(study_of(40), transport, Decoder([True] * 40), QUICK)
    prometheus = watched.prometheus
    wait_until(lambda: prometheus.query("sum(groundglass_scans_total) > 0"), "the scan")
    wait_until(lambda: prometheus.query("groundglass_slices:rate1m > 0"), "the rules")
    wait_until(lambda: not prometheus.query("groundglass_slices:rate1m > 0"), "the end of the load")
    assert prometheus.query("sum(groundglass_open_studies) > 0")  # the trap: a part of it at each replica
    started = "NoReplicaScraped|BalancerDown"  # before anything was scraped
    assert not prometheus.query_range(f'ALERTS{{alertname!~"{started}",alertstate="firing"}}')


def test_troubles_at_replicas_fire_their_alerts(watched: Monitored) -> None:
    """Refusals, a full queue, lack of room, and studies without an end: each by its name and its replica."""
    small, slow = watched.servers
    with repeated(lambda: contradiction(small)), repeated(lambda: abandoned_study(small)):
        with repeated(lambda: request_of_no_study(slow, ROWS), AT_ONCE):
            provoked(watched, "StudiesDropped", instance=small.metrics_address)
            provoked(watched, "HighErrorRate", instance=small.metrics_address)
            provoked(watched, "LongQueueTime", instance=slow.metrics_address, model=contract.UNET.name)
            assert not watched.prometheus.firing("NetworkStalled")
        provoked(watched, "StuckStudies")
    for name in ("HighErrorRate", "StudiesDropped"):
        assert not watched.prometheus.firing(name, instance=slow.metrics_address)


def test_alerts_end_with_their_cause(watched: Monitored) -> None:
    """When the load is over, no alert is left."""
    wait_until(lambda: not watched.prometheus.alerts(), "the end of all alerts")


def test_a_replica_that_hangs_and_one_that_is_killed_are_missed(watched: Monitored) -> None:
    """A network that answers nobody fires its alert; ``kill -9`` those of its address and of the number of replicas."""
    left, hanging = watched.servers
    with repeated(lambda: request_of_no_study(hanging, MANY_ROWS), 3):
        provoked(watched, "NetworkStalled", instance=hanging.metrics_address)
        assert not watched.prometheus.firing("ReplicaMissing")
        os.kill(hanging.pid, signal.SIGKILL)
        provoked(watched, "ReplicaDown", instance=hanging.metrics_address)
        provoked(watched, "ReplicaMissing")
    assert not watched.prometheus.firing("ReplicaDown", instance=left.metrics_address)
    assert not watched.prometheus.firing("NoReplicaScraped")


def test_a_balancer_without_replicas_says_so(watched: Monitored) -> None:
    """With the last server killed, the balancer has none, refuses every request, and nothing is left to scrape."""
    os.kill(watched.servers[0].pid, signal.SIGKILL)
    with repeated(lambda: request_through(watched)):
        provoked(watched, "BalancerWithoutReplicas", instance=watched.balancer.metrics_address)
        provoked(watched, "NoReplicaScraped")
        provoked(watched, "HighErrorRate", instance=watched.balancer.metrics_address)
    assert not watched.prometheus.firing("BalancerDown")


def test_a_killed_balancer_is_missed(watched: Monitored) -> None:
    """Without the balancer that alert fires."""
    watched.balancer.process.kill()
    provoked(watched, "BalancerDown")


@pytest.mark.usefixtures("watched")  # where its servers are missing, this is skipped as well
def test_all_alerts_were_provoked() -> None:
    """No alert of the deployment was left out above, the one about GPUs excepted."""
    assert {rule["alert"] for rule in all_rules() if "alert" in rule} - PROVOKED == {"GpuMemoryFull"}
