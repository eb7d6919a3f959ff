"""A connection that does not come about over TLS: the reason in the user's words, at once."""

import contextlib
import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from client_study import QUICK, Decoder, study_of
from groundglass.errors import ServerUnreachable, TlsFailed
from groundglass.tls import TlsSettings
from groundglass_client.connection import connect
from groundglass_client.replicas import ReplicaTransport
from groundglass_client.requests import Request, Tensors
from groundglass_client.session import SessionSettings, analyse
from groundglass_client.testing import InMemoryTransport
from groundglass_client.transport import ServedScan

YEAR_2020 = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
YEAR_2019 = datetime.datetime(2019, 1, 1, tzinfo=datetime.timezone.utc)


@dataclass(frozen=True)
class Files:
    """Certificates of one authority, and what is of another."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / f"{name}.pem"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """ca, good, expired, elsewhere (another host's); other_ca, and client (of that CA) with client_key."""
    made = Files(tmp_path_factory.mktemp("tls"))
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(made["ca"]))
    other.cert_pem.write_to_path(str(made["other_ca"]))
    for name, issued in (
        ("good", authority.issue_cert("127.0.0.1")),
        ("expired", authority.issue_cert("127.0.0.1", not_before=YEAR_2019, not_after=YEAR_2020)),
        ("elsewhere", authority.issue_cert("elsewhere.groundglass.test")),
    ):
        issued.private_key_and_cert_chain_pem.write_to_path(str(made[name]))
    client = other.issue_cert("client@groundglass.test")
    client.cert_chain_pems[0].write_to_path(str(made["client"]))
    client.private_key_pem.write_to_path(str(made["client_key"]))
    return made


@contextlib.contextmanager
def listening(shown: Path, client_ca: Path | None = None, version: ssl.TLSVersion | None = None) -> Iterator[str]:
    """A server that gets as far as the handshake: it shows ``shown``, and asks for a certificate of ``client_ca``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown)
    context.set_alpn_protocols(["h2"])
    if version is not None:
        context.maximum_version = version
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener was shut down
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    context.wrap_socket(connection, server_side=True).close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def failure(address: str, tls: TlsSettings | None) -> ServerUnreachable:
    """What a client says that connects so."""
    with connect(address, tls=tls) as transport, pytest.raises(ServerUnreachable) as told:
        transport.describe(5.0)
    assert str(told.value).startswith(address)
    assert "\n" not in str(told.value)
    return told.value


@pytest.mark.parametrize(
    ("shown", "trusted", "words"),
    [
        ("good", "other_ca", "that the CA in {ca} did not sign (unable to get local issuer certificate)"),
        ("good", None, "that the system's CAs did not sign"),
        ("expired", "ca", "shows a certificate that has expired"),
        ("elsewhere", "ca", "shows a certificate for another name"),
    ],
)
def test_a_server_that_is_not_to_be_trusted_is_not_talked_to(
    files: Files, shown: str, trusted: str | None, words: str
) -> None:
    """A certificate of another CA, of another host, or of the past is told as such."""
    ca = None if trusted is None else files[trusted]
    with listening(files[shown]) as address:
        error = failure(address, TlsSettings(ca))
    assert isinstance(error, TlsFailed)
    assert words.format(ca=ca) in str(error)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_server_that_asks_for_a_certificate_is_told_as_such(files: Files, version: ssl.TLSVersion) -> None:
    """Without a client certificate the options for one are named; with one of a stranger its file is."""
    stranger = TlsSettings(files["ca"], files["client"], files["client_key"])
    with listening(files["good"], files["ca"], version) as address:
        errors = [failure(address, TlsSettings(files["ca"])), failure(address, stranger)]
    assert "does it ask for a client certificate? Then give it with --tls-cert and --tls-key" in str(errors[0])
    assert f"does it trust the CA of {files['client']}" in str(errors[1])


def test_plain_grpc_to_a_tls_port_is_told_as_such(files: Files) -> None:
    """A server that hangs up on plain gRPC may be one that speaks TLS, and the option is named."""
    with listening(files["good"]) as address:
        assert "does it speak TLS? Then name the file of its CA with --tls-ca" in str(failure(address, None))


def test_nobody_at_the_address_is_no_matter_of_tls(files: Files) -> None:
    """A refused connection is told as it is, with TLS too."""
    with connect("127.0.0.1:1", tls=TlsSettings(files["ca"])) as transport:
        with pytest.raises(ServerUnreachable, match="Connection refused") as told:
            transport.describe(5.0)
        assert not isinstance(told.value, TlsFailed)


class Changing(InMemoryTransport):
    """Fails over TLS: every first contact, or the request of that number."""

    def __init__(self, *, at_first: bool = False, at_request: int = -1) -> None:
        super().__init__()
        self.at_first, self.at_request = at_first, at_request
        self.contacts = self.requests = 0

    def describe(self, timeout_s: float) -> ServedScan:
        self.contacts += 1
        if self.at_first:
            raise TlsFailed("shows a certificate that has expired")
        return super().describe(timeout_s)

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        self.requests += 1
        if self.requests == self.at_request:
            future: Future[Tensors] = Future()
            future.set_exception(TlsFailed("shows a certificate that has expired"))
            return future
        return super().send(request, timeout_s)


def test_a_first_contact_that_fails_over_tls_is_not_tried_again() -> None:
    """Nothing gets better by waiting: the study fails at the first word of it."""
    transport = Changing(at_first=True)
    patient = SessionSettings(connect_timeout_s=600.0, recovery_s=600.0)
    with pytest.raises(TlsFailed, match="has expired"):
        analyse(study_of(3), transport, Decoder([True] * 3), patient)
    assert transport.contacts == 1


def test_certificates_that_change_during_a_study_do_not_end_it() -> None:
    """In the middle of a study the request is sent again, and the verdict is right."""
    transport = Changing(at_request=3)
    report = analyse(study_of(20), transport, Decoder([True] * 20), QUICK).report
    assert (report.longest_run, report.scan_positive) == (20, True)


def test_a_replica_that_can_not_be_trusted_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """The others answer, and the reason is logged."""
    transport = ReplicaTransport([Changing(at_first=True), Changing()])
    report = analyse(study_of(20), transport, Decoder([True] * 20), QUICK).report
    assert (report.longest_run, report.scan_positive) == (20, True)
    assert "a replica is left out: shows a certificate that has expired" in caplog.text
