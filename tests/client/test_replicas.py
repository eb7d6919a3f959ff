"""Several servers share a study, and one that fails costs nothing but time."""

from concurrent.futures import Future
from dataclasses import replace

import pytest

from client_study import QUICK, Decoder, study_of
from groundglass.errors import ServerRefused, ServerUnreachable, SettingError
from groundglass_client.connection import connect
from groundglass_client.replicas import ReplicaTransport
from groundglass_client.requests import Request, Tensors
from groundglass_client.session import SessionSettings, analyse
from groundglass_client.testing import InMemoryTransport
from groundglass_client.transport import ServedScan


class Counting(InMemoryTransport):
    """Counts its requests; dies after ``lives`` of them."""

    def __init__(self, lives: float = float("inf"), version: str = "1", positive_run: int = 15) -> None:
        super().__init__(positive_run)
        self.lives, self.version, self.run, self.requests = lives, version, positive_run, 0

    def describe(self, timeout_s: float) -> ServedScan:
        if self.lives <= 0:
            raise ServerUnreachable("connection refused")
        return ServedScan(self.version, self.run)

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        self.requests += 1
        if self.requests > self.lives:
            self.lives = 0
            future: Future[Tensors] = Future()
            future.set_exception(ServerUnreachable("connection reset"))
            return future
        return super().send(request, timeout_s)


POSITIVES = [5 <= index < 25 for index in range(60)]


def test_a_study_is_shared_and_its_verdict_is_the_fold() -> None:
    """Every replica answers some chunks, none holds the whole scan, and the verdict is right."""
    replicas = [Counting(), Counting(), Counting()]
    report = analyse(study_of(60), ReplicaTransport(replicas), Decoder(POSITIVES), QUICK).report
    assert (report.longest_run, report.scan_positive) == (20, True)
    assert [result.positive for result in report.slices] == POSITIVES


@pytest.mark.parametrize("lives", [0, 1, 4])
def test_a_replica_that_dies_is_left_out(lives: int) -> None:
    """Whether a replica is dead from the start or dies on the way, the others answer its chunks."""
    dying, living = Counting(lives), Counting()
    report = analyse(study_of(60), ReplicaTransport([dying, living]), Decoder(POSITIVES), QUICK).report
    assert (report.longest_run, report.scan_positive) == (20, True)
    assert living.requests >= 15 - lives


def test_all_replicas_gone_is_one_error() -> None:
    """When none can be reached, the first one's reason is told."""
    with pytest.raises(ServerUnreachable, match="connection refused"):
        analyse(study_of(3), ReplicaTransport([Counting(0), Counting(0)]), Decoder([True] * 3), QUICK)


def test_versions_that_differ_are_named() -> None:
    """Replicas of two model versions are a mixture, and the report says so."""
    transport = ReplicaTransport([Counting(version="1"), Counting(version="2")])
    assert analyse(study_of(6), transport, Decoder([True] * 6), QUICK).report.model_version == "1 and 2"


def test_replicas_of_another_rule_are_refused() -> None:
    """Replicas that would give different verdicts on the same slices are no replicas."""
    with pytest.raises(ServerRefused, match="from 10 and from 15 slices"):
        ReplicaTransport([Counting(), Counting(positive_run=10)]).describe(1.0)


def test_a_replica_recovers() -> None:
    """A replica that rests after a failure is asked again later."""
    replica, other = Counting(lives=1), Counting()
    transport = ReplicaTransport([replica, other])
    settings: SessionSettings = replace(QUICK, window=1)
    analyse(study_of(20), transport, Decoder([True] * 20), settings)
    asked = replica.requests
    replica.lives = float("inf")
    for known in transport._replicas:
        known.rests_until = 0.0
    analyse(study_of(20), transport, Decoder([True] * 20), settings)
    assert replica.requests > asked


@pytest.mark.parametrize(("servers", "words"), [("a:1,a:1", "stands twice"), ("a:1,", "HOST:PORT"), ("", "HOST:PORT")])
def test_addresses_that_are_none_are_refused(servers: str, words: str) -> None:
    """A list of servers with a hole or a repetition is told as such."""
    with pytest.raises(SettingError, match=words), connect(servers):
        pass
