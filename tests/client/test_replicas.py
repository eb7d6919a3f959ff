"""Several servers share a study, and one that fails costs nothing but time."""

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from client_study import QUICK, Decoder, study_of
from groundglass import contract
from groundglass.errors import ServerRefused, ServerUnreachable, SettingError
from groundglass_client.connection import connect
from groundglass_client.replicas import ReplicaTransport
from groundglass_client.requests import Request, Tensors, fold_request
from groundglass_client.session import SessionSettings, analyse
from groundglass_client.testing import InMemoryTransport
from groundglass_client.transport import ServedScan


class Counting(InMemoryTransport):
    """Counts its requests; dies after ``lives`` of them."""

    def __init__(
        self, lives: float = float("inf"), version: str = "1", positive_run: int = 15, pinned: tuple[str, ...] = ()
    ) -> None:
        super().__init__(positive_run, live=version, pinned=pinned, mark_from_hu={"2": 100})
        self.lives, self.requests, self.slices = lives, 0, list[Request]()

    def describe(self, timeout_s: float) -> ServedScan:
        if self.lives <= 0:
            raise ServerUnreachable("connection refused")
        return super().describe(timeout_s)

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        self.requests += 1
        self.slices += [request] if request.model is not contract.SCAN_AGGREGATOR else []
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


def test_a_plain_study_goes_to_replicas_of_one_version(caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of a rolling swap the version of most replicas answers, and who is left out is told once."""
    replicas = [Counting(version="1"), Counting(version="2"), Counting(version="1")]
    transport = ReplicaTransport(replicas)
    for _ in range(2):
        report = analyse(study_of(60), transport, Decoder(POSITIVES), QUICK).report
        assert (report.model_version, [result.positive for result in report.slices]) == ("1", POSITIVES)
    assert [bool(replica.slices) for replica in replicas] == [True, False, True]
    assert caplog.text.count("replica 2 of 3, where version 2 is live, takes no part in studies on version 1") == 1


def test_a_study_on_a_named_version_goes_where_that_version_is() -> None:
    """Replicas that were promoted already keep answering the version that most are still on."""
    replicas = [Counting(pinned=("1",)), Counting(version="2", pinned=("1", "2")), Counting(pinned=("1",))]
    transport = ReplicaTransport(replicas)
    assert transport.describe(1.0) == ServedScan("1", 15, frozenset({"1", "2"}))
    report = analyse(study_of(60), transport, Decoder(POSITIVES), QUICK).report
    assert (report.model_version, report.longest_run) == ("1", 20)
    assert len(transport._suitable(Request(contract.pinned("1"), {}, ()))) == 3
    assert len(transport._suitable(Request(contract.pinned("2"), {}, ()))) == 1
    report = analyse(study_of(60), transport, Decoder(POSITIVES), replace(QUICK, version="2")).report
    assert (report.model_version, report.longest_run) == ("2", 0)
    assert {request.pin for replica in replicas[::2] for request in replica.slices} == {"1"}


@pytest.mark.parametrize(
    ("served", "live"),
    [
        ((("2", ()), ("1", ()), ("2", ())), "2"),
        ((("10", ()), ("9", ())), "9"),
        ((("1", ("1",)), ("2", ("1", "2")), ("2", ("2",)), ("1", ("2",))), "2"),
    ],
    ids=["most", "the lower of two", "the one that more have by name"],
)
def test_the_live_version_is_that_of_most_replicas(served: tuple[tuple[str, tuple[str, ...]], ...], live: str) -> None:
    """The version of most replicas counts as live; of several, the one that more can be asked for; then the lower."""
    replicas = [Counting(version=version, pinned=pinned) for version, pinned in served]
    assert ReplicaTransport(replicas).describe(1.0).model_version == live


def test_a_version_retired_on_one_replica_is_asked_of_the_others() -> None:
    """A study goes on with its version while any replica still has it, and is not begun again."""
    leaving, staying = Counting(pinned=("1",)), Counting(pinned=("1",))
    heard: list[int] = []

    def on_slices(count: int) -> None:
        heard.append(count)
        leaving.retire("1")

    transport = ReplicaTransport([leaving, staying])
    report = analyse(study_of(60), transport, Decoder(POSITIVES), QUICK, on_slices).report
    assert (report.model_version, report.longest_run) == ("1", 20)
    assert min(heard) > 0
    assert len(staying.slices) > len(leaving.slices)


def test_a_version_retired_on_every_replica_is_gone() -> None:
    """When the last replica gives the version up, the study is computed again on the one that is live."""
    replicas = [Counting(pinned=("1", "2")) for _ in range(2)]
    answered = 0

    def on_slices(count: int) -> None:
        nonlocal answered
        answered += count
        for replica in replicas:
            replica.promote("2")
            replica.retire("1")

    report = analyse(study_of(60), ReplicaTransport(replicas), Decoder(POSITIVES), QUICK, on_slices).report
    assert (report.model_version, report.longest_run, answered) == ("2", 0, 60)


def test_replicas_that_change_places_are_noticed() -> None:
    """When one replica leaves the version of a plain study and another takes it on, the study is computed again."""
    replicas = [Counting(version="1"), Counting(version="2")]
    heard: list[int] = []

    def on_slices(count: int) -> None:
        heard.append(count)
        replicas[0].promote("2")
        replicas[1].promote("1")

    report = analyse(study_of(60), ReplicaTransport(replicas), Decoder(POSITIVES), QUICK, on_slices).report
    assert (report.model_version, [result.positive for result in report.slices]) == ("1", POSITIVES)
    assert min(heard) < 0
    assert replicas[1].slices


def test_a_replica_that_can_not_be_reached_is_not_trusted_with_a_version() -> None:
    """Slices go to no replica that did not say what it serves; the fold of a scan may."""
    silent, known = Counting(lives=0), Counting()
    transport = ReplicaTransport([silent, known])
    transport.describe(1.0)
    silent.lives = float("inf")
    for replica in transport._replicas:
        replica.rests_until = 0.0
    request = fold_request(np.ones(3, np.bool_), "key")
    for model in (contract.CT_SCAN, contract.SCAN_AGGREGATOR):
        chosen = {replica.transport for replica in transport._suitable(replace(request, model=model))}
        assert (silent in chosen) == (model is contract.SCAN_AGGREGATOR)


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
