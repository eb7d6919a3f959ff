"""TLS and mutual TLS to a real server behind the deployment's balancer: right verdicts, or one line of why not."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import probe_network
from balancer import Balancer, Certificates, balancer, free_ports
from client_study import study_of
from command import assert_one_clear_line, groundglass
from debian_servers import environment, program
from groundglass.errors import ServerRefused, ServerUnreachable, TlsFailed
from groundglass.study import SliceSource
from groundglass.tls import TlsSettings
from groundglass_client.buffers import Buffers
from groundglass_client.connection import connect
from groundglass_client.phantom import PhantomSettings, write_phantom
from groundglass_client.session import SessionSettings, analyse
from groundglass_client.transport import GrpcTransport
from groundglass_ensemble.embedded import EmbeddedTriton
from groundglass_ensemble.versions import ServerControl
from waiting import wait_until

pytestmark = pytest.mark.triton

PROJECT = Path(__file__).parents[2]
SIDE = 32
POSITIVES = [5 <= index < 25 for index in range(40)]
HOW = SessionSettings(chunk_bytes=4 * SIDE * SIDE * 2, connect_timeout_s=0.5)


def decoded(source: SliceSource) -> NDArray[np.int16]:
    """A slice that the probe network calls positive where it must."""
    return probe_network.slices([POSITIVES[source.index]], SIDE)[0]


def assert_right(transport: GrpcTransport) -> None:
    """The verdict and every slice's are what they must be."""
    report = analyse(study_of(len(POSITIVES), SIDE), transport, decoded, HOW).report
    assert [result.positive for result in report.slices] == POSITIVES
    assert (report.longest_run, report.scan_positive) == (20, True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of the balancer and of a client, by one authority."""
    return Certificates.issue(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def known(certificates: Certificates) -> TlsSettings:
    """A client that the balancer knows."""
    return TlsSettings(certificates.ca, certificates.client, certificates.client_key)


@pytest.fixture(scope="module")
def stranger(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> TlsSettings:
    """A client that trusts the balancer, with a certificate of another authority."""
    foreign = Certificates.issue(tmp_path_factory.mktemp("foreign"))
    return TlsSettings(certificates.ca, foreign.client, foreign.client_key)


@contextmanager
def in_front(server: EmbeddedTriton, certificates: Certificates, folder: Path, mutual_tls: str) -> Iterator[Balancer]:
    """The deployment's balancer, before a server that runs."""
    grpc, http = (int(address.rpartition(":")[2]) for address in (server.grpc_address, server.http_address))
    settings = replace(server.settings, grpc_port=grpc, http_port=http)
    with balancer([settings], folder, certificates, LB_MUTUAL_TLS=mutual_tls) as front:
        front.await_replicas(1)
        yield front


@pytest.fixture(scope="module")
def mutual(
    probe_server: EmbeddedTriton, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of a balancer that asks for client certificates."""
    with in_front(probe_server, certificates, tmp_path_factory.mktemp("mutual"), "required") as front:
        yield front.grpc_address


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study on disk."""
    study = tmp_path_factory.mktemp("phantom") / "study"
    write_phantom(PhantomSettings(slices=6), study)
    return study


def test_a_study_over_tls_has_the_right_verdict(
    probe_server: EmbeddedTriton, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A balancer that asks for no certificate needs a CA that the client names, or that its system trusts."""
    with in_front(probe_server, certificates, tmp_path, "off") as front:
        with connect(front.grpc_address, tls=TlsSettings(certificates.ca)) as transport:
            assert_right(transport)
        with connect(front.grpc_address, tls=TlsSettings()) as transport, pytest.raises(TlsFailed, match="--tls-ca"):
            assert_right(transport)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))  # gRPC's own list does not know what it names
        with connect(front.grpc_address, tls=TlsSettings()) as transport:
            assert_right(transport)


def test_mutual_tls_lets_in_who_has_a_certificate(mutual: str, known: TlsSettings) -> None:
    """With a certificate of the balancer's client CA the study is answered."""
    with connect(mutual, channels=2, tls=known) as transport:
        assert_right(transport)


def test_mutual_tls_refuses_everybody_else(mutual: str, certificates: Certificates, stranger: TlsSettings) -> None:
    """No certificate, one of another authority, and plain gRPC each get nothing but the likely reason."""
    for tls, words in (
        (TlsSettings(certificates.ca), "does it ask for a client certificate"),
        (stranger, "does it trust the CA of"),
        (None, "does it speak TLS"),
    ):
        with connect(mutual, tls=tls) as transport, pytest.raises(ServerUnreachable, match=words):
            assert_right(transport)


def test_shared_memory_that_the_balancer_denies_is_done_without(
    mutual: str, known: TlsSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """PERMISSION_DENIED for a region is one line in the log, and the slices travel as bytes."""
    caplog.set_level(logging.INFO)
    with closing(Buffers(shared=True)) as buffers, GrpcTransport(mutual, buffers, tls=known) as transport:
        assert_right(transport)
    (line,) = [record.message for record in caplog.records if "shared memory" in record.message]
    assert "slices travel as bytes: not served through the balancer" in line


def test_the_command_line_analyses_over_mutual_tls(
    phantom: Path, mutual: str, known: TlsSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By options or by environment variables, the report is that of the study."""
    options = ("--tls-ca", known.ca, "--tls-cert", known.certificate, "--tls-key", known.key)
    by_options = groundglass("analyze", phantom, "--server", mutual, "--json", "-", *options)
    for name, value in (("CA", known.ca), ("CERT", known.certificate), ("KEY", known.key)):
        monkeypatch.setenv(f"GROUNDGLASS_TLS_{name}", str(value))
    by_environment = groundglass("analyze", phantom, "--server", mutual, "--json", "-")
    for done in (by_options, by_environment):
        assert (done.returncode, done.stderr) == (0, "")
        assert len(json.loads(done.stdout)["slices"]) == 6


def test_the_command_line_says_in_one_line_what_is_wrong(
    phantom: Path, mutual: str, probe_server: EmbeddedTriton, certificates: Certificates, stranger: TlsSettings
) -> None:
    """gRPC's own account of a failed handshake is not printed; ours names the option or the file."""
    at_mutual, trusting = ("--server", mutual), ("--tls-ca", certificates.ca)
    for options, words in (
        ((*at_mutual, *trusting), "--tls-cert"),
        ((*at_mutual, *trusting, "--tls-cert", stranger.certificate, "--tls-key", stranger.key), "does it trust"),
        ((*at_mutual, "--tls-ca", certificates.client), "did not sign"),
        ((*at_mutual, "--tls"), "the system's CAs did not sign"),
        (("--server", probe_server.grpc_address, "--tls"), "does not speak TLS"),
        ((*at_mutual, *trusting, "--tls-cert", certificates.client), "--tls-key"),
        (trusting, "name it with --server"),
    ):
        assert_one_clear_line(groundglass("analyze", phantom, *options), words)


def test_a_load_goes_over_mutual_tls(mutual: str, known: TlsSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """locust's own options for TLS are its web page's: the environment names the files, and every study is answered."""
    command = [sys.executable, "-m", "locust", "-f", "benchmarks/locustfile.py", "--host", mutual, "--headless"]
    command += ["--users", "1", "--slices", "20", "--run-time", "2s", "--stop-timeout", "20", "--only-summary"]
    refused = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "does it speak TLS" in refused.stderr
    for name, value in (("CA", known.ca), ("CERT", known.certificate), ("KEY", known.key)):
        monkeypatch.setenv(f"GROUNDGLASS_TLS_{name}", str(value))
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@contextmanager
def tls_before(server: EmbeddedTriton, certificates: Certificates, folder: Path) -> Iterator[str]:
    """Mutual TLS and nothing else in front of a server: every call passes, those of its operator too."""
    (port,) = free_ports(1)
    configuration = folder / "haproxy.cfg"
    configuration.write_text(
        "defaults\n    mode tcp\n    timeout connect 2s\n    timeout client 30s\n    timeout server 30s\n"
        f"listen operators\n    bind 127.0.0.1:{port} ssl crt {certificates.server} alpn h2 "
        f"verify required ca-file {certificates.ca}\n    server triton {server.grpc_address}\n"
    )
    process = subprocess.Popen([program("haproxy"), "-db", "-f", str(configuration)], env=environment())
    try:
        wait_until(lambda: _accepts(port), "HAProxy")
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_operators_speak_mutual_tls_too(
    probe_server: EmbeddedTriton, certificates: Certificates, known: TlsSettings, mutual: str, tmp_path: Path
) -> None:
    """`groundglass models` reads what a server serves over mutual TLS; the deployment's balancer does not let it."""
    options = ("--tls-ca", known.ca, "--tls-cert", known.certificate, "--tls-key", known.key)
    with tls_before(probe_server, certificates, tmp_path) as address:
        status = ("models", "status", "--repository", tmp_path / "none", "--server", address, "--json")
        served, plain = (groundglass(*status, *more) for more in (options, ()))
        assert (served.stderr, plain.stderr) == ("", "")
        assert json.loads(served.stdout)["servers"][0]["served"]["live"] == 1
        assert "does it speak TLS" in json.loads(plain.stdout)["servers"][0]["problem"]
        with ServerControl(address, tls=TlsSettings(certificates.ca)) as control, pytest.raises(TlsFailed):
            control.served()
    with ServerControl(mutual, tls=known) as control, pytest.raises(ServerRefused, match="not served through"):
        control.served()
