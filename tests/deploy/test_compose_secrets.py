"""What make_certificates.sh makes for docker-compose.yml: every secret, usable by balancer, servers and clients."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from compose_file import PROJECT, compose, make_secrets, on_host, services
from debian_servers import environment, program
from groundglass.tls import TlsSettings


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that make_certificates.sh fills."""
    return make_secrets(tmp_path_factory.mktemp("deployment") / "secrets")


def test_make_certificates_makes_every_secret(secrets: Path) -> None:
    """All files that compose mounts are made, in a folder that others can't enter; a second run changes nothing."""
    wanted = {Path(secret["file"]).name for secret in compose()["secrets"].values()}
    assert wanted <= {file.name for file in secrets.iterdir()}
    assert secrets.stat().st_mode & 0o777 == 0o700
    before = {file.name: file.read_bytes() for file in secrets.iterdir()}
    again = subprocess.run([PROJECT / "deploy" / "make_certificates.sh", secrets], capture_output=True, text=True)
    assert again.returncode == 1
    assert f"{secrets} exists" in again.stderr
    assert {file.name: file.read_bytes() for file in secrets.iterdir()} == before


def test_certificates_work_both_ways(secrets: Path) -> None:
    """A client that trusts the CA connects by each name of the balancer, and only if it shows its own certificate."""
    for name in ("localhost", "lb", "127.0.0.1"):
        assert handshake(secrets, name, with_certificate=True) == "h2"
    with pytest.raises(ssl.SSLError):
        handshake(secrets, "localhost", with_certificate=False)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(secrets, "elsewhere", with_certificate=True)


def test_locust_shows_its_certificate(secrets: Path) -> None:
    """The environment of ``locust`` names the files that a client of the balancer needs."""
    given = {
        name: value.replace("/run/secrets", str(secrets)) for name, value in services()["locust"]["environment"].items()
    }
    assert TlsSettings.of_environment(given) == TlsSettings(
        secrets / "ca.pem", secrets / "client.pem", secrets / "client.key"
    )


def handshake(secrets: Path, name: str, *, with_certificate: bool) -> str | None:
    """Connect to a server with the balancer's certificate, which asks for one; gives the protocol agreed on."""
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(secrets / "client-ca.pem"))
    serving.verify_mode = ssl.CERT_REQUIRED
    serving.load_cert_chain(secrets / "lb.pem")
    serving.set_alpn_protocols(["h2"])
    calling = ssl.create_default_context(cafile=str(secrets / "ca.pem"))
    calling.set_alpn_protocols(["h2"])
    if with_certificate:
        calling.load_cert_chain(secrets / "client.pem", secrets / "client.key")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            accepted, _ = listening.accept()
            with accepted:
                try:
                    with serving.wrap_socket(accepted, server_side=True) as secured:
                        secured.sendall(b"1")
                except (ssl.SSLError, ConnectionError):
                    pass  # what the client is told

        answering = threading.Thread(target=answer)
        answering.start()
        try:
            with (
                socket.create_connection(listening.getsockname(), timeout=10) as plain,
                calling.wrap_socket(plain, server_hostname=name) as secured,
            ):
                assert secured.recv(1) == b"1"
                return secured.selected_alpn_protocol()
        finally:
            answering.join(10)


def test_the_balancer_takes_its_settings(secrets: Path) -> None:
    """The real HAProxy finds the configuration good with compose's environment and certificates."""
    service = services()["lb"]
    variables = {**environment(), "LB_FOLDER": str(on_host(service, "/usr/local/etc/haproxy"))}
    for variable, value in service["environment"].items():
        variables[variable] = value.replace("/run/secrets", str(secrets))
    file = on_host(service, "/usr/local/etc/haproxy/haproxy.cfg")
    command = [program("haproxy"), "-c", "-f", str(file)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
