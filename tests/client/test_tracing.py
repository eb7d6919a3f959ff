"""A traced study: a span of its own and one for each request below it, with nothing in them that names a patient."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from client_study import QUICK, Decoder, study_of
from collector import Collector, collector
from groundglass.errors import ServerRefused, ServerUnreachable, SettingError
from groundglass_client.requests import Request, Tensors
from groundglass_client.session import analyse
from groundglass_client.testing import InMemoryTransport
from groundglass_client.tracing import traced

POSITIVES = [5 <= index < 25 for index in range(40)]
CHUNKS = 10


class Noting(InMemoryTransport):
    """Keeps the identity that every request came with; a request of that number meets an error."""

    def __init__(self, error: Exception | None = None, *, at_request: int = -1) -> None:
        super().__init__(pinned=("1",))
        self.error, self.at_request = error, at_request
        self.traceparents: list[str | None] = []

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        self.traceparents.append(request.traceparent)
        if self.error is not None and len(self.traceparents) == self.at_request:
            future: Future[Tensors] = Future()
            future.set_exception(self.error)
            return future
        return super().send(request, timeout_s)


@pytest.fixture
def collected() -> Iterator[Collector]:
    """A collector that listens."""
    with collector() as listening:
        yield listening


def test_requests_are_spans_below_the_study(collected: Collector) -> None:
    """One trace: the study, and below it a span a request whose identity the server is told."""
    server = Noting()
    with traced(server, collected.url, len(POSITIVES)) as transport:
        report = analyse(study_of(40), transport, Decoder(POSITIVES), QUICK).report
    assert (report.longest_run, report.scan_positive) == (20, True)
    (study,) = [span for span in collected.spans if span.name == "study"]
    requests = [span for span in collected.spans if span is not study]
    assert study.attributes == {"groundglass.slices": 40, "groundglass.live_version": "1"}
    assert {(span.name, span.parent) for span in requests} == {("infer ct_scan_v1", study.id)}
    told = [str(traceparent).split("-") for traceparent in server.traceparents]
    assert sorted((trace, span) for _, trace, span, _ in told) == sorted((study.trace, span.id) for span in requests)
    assert len(requests) == CHUNKS
    assert sum(span.attributes["groundglass.slices"] for span in requests) == 40
    for span in requests:
        assert set(span.attributes) == {"groundglass.slices", "groundglass.bytes", "groundglass.model_version"}
        assert span.attributes["groundglass.model_version"] == "1"
        assert span.attributes["groundglass.bytes"] >= 4 * 16 * 16 * 2
        assert span.error is None


def test_a_request_that_is_sent_again_is_two_spans(collected: Collector) -> None:
    """The first one failed, by the kind of its error; the study did not."""
    server = Noting(ServerUnreachable("HOSPITAL^NAME"), at_request=4)
    with traced(server, collected.url, len(POSITIVES)) as transport:
        analyse(study_of(40), transport, Decoder(POSITIVES), QUICK)
    errors = [span.error for span in collected.spans if span.error is not None]
    assert errors == ["ServerUnreachable"]
    requests = [span for span in collected.spans if span.name == "infer ct_scan_v1"]
    assert len(requests) == CHUNKS + 1


def test_a_study_that_fails_is_a_span_without_the_errors_words(collected: Collector) -> None:
    """What an error says may name a file: only its kind goes to the collector."""
    server = Noting(ServerRefused("HOSPITAL^NAME"), at_request=2)
    with pytest.raises(ServerRefused), traced(server, collected.url, len(POSITIVES)) as transport:
        analyse(study_of(40), transport, Decoder(POSITIVES), QUICK)
    (study,) = [span for span in collected.spans if span.name == "study"]
    assert study.error == "ServerRefused"
    assert not any(b"HOSPITAL" in body for body in collected.bodies)


def test_a_collector_that_takes_nothing_costs_a_warning_and_no_study(caplog: pytest.LogCaptureFixture) -> None:
    """The verdict is right, and one line says which address takes no traces."""
    caplog.set_level(logging.WARNING, "groundglass_client")
    with collector(status=400) as refusing, traced(Noting(), refusing.url, len(POSITIVES)) as transport:
        report = analyse(study_of(40), transport, Decoder(POSITIVES), QUICK).report
    assert report.longest_run == 20
    ours = [record.message for record in caplog.records if record.name.startswith("groundglass_client")]
    assert len(ours) == 1
    assert refusing.url in ours[0]


@pytest.mark.parametrize("url", ["", "localhost:4318", "grpc://localhost:4317", "http:///v1/traces"])
def test_what_is_no_endpoint_is_refused(url: str) -> None:
    """An address without scheme or host is told as such, before the study is sent."""
    with pytest.raises(SettingError, match="OTLP/HTTP"), traced(Noting(), url, 1):
        pass


def test_nothing_is_imported_for_a_study_that_is_not_traced() -> None:
    """The client works without the extra, and pays nothing for it."""
    program = """
import sys
import groundglass.cli
import groundglass_client.connection, groundglass_client.session, groundglass_client.shadow
from groundglass.cli.connecting import tracing
with tracing(transport := object(), None, 1) as carrier:
    assert carrier is transport
sys.exit(sum(name.startswith("opentelemetry") for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
