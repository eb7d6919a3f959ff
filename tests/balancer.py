"""The deployment's balancer in front of real servers: its own configuration, and names that a DNS server resolves."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import trustme
from dnslib import QTYPE, RR, A, DNSRecord
from dnslib.server import BaseResolver, DNSLogger, DNSServer

from debian_servers import environment, program
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from waiting import wait_until

CONFIGURATION = Path(__file__).parents[1] / "deploy" / "haproxy" / "haproxy.cfg"
HOST = "127.0.0.1"


class Names(BaseResolver):
    """Answers with the addresses that the deployment's name has now."""

    def __init__(self, addresses: list[str]) -> None:
        self.addresses = addresses

    def resolve(self, request: DNSRecord, handler: object) -> DNSRecord:
        """One A record an address; nothing of another kind."""
        reply = request.reply()
        if request.q.qtype == QTYPE.A:
            for address in self.addresses:
                reply.add_answer(RR(request.q.qname, QTYPE.A, ttl=1, rdata=A(address)))
        return reply


@dataclass(frozen=True)
class Certificates:
    """What a deployment's operator hands out: files in PEM."""

    ca: Path
    server: Path
    client: Path
    client_key: Path

    @classmethod
    def issue(cls, folder: Path) -> Certificates:
        """New ones, by an authority of their own, for the loopback address."""
        authority = trustme.CA()
        server, client = authority.issue_cert(HOST), authority.issue_cert("client@groundglass.test")
        made = cls(folder / "ca.pem", folder / "lb.pem", folder / "client.pem", folder / "client.key")
        authority.cert_pem.write_to_path(str(made.ca))
        server.private_key_and_cert_chain_pem.write_to_path(str(made.server))
        client.cert_chain_pems[0].write_to_path(str(made.client))
        client.private_key_pem.write_to_path(str(made.client_key))
        return made


@dataclass
class Balancer:
    """A running balancer: where it listens, and what it says of itself."""

    process: subprocess.Popen[bytes]
    grpc_port: int
    metrics_port: int
    names: Names
    log_file: Path
    certificates: Certificates

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of gRPC over TLS."""
        return f"{HOST}:{self.grpc_port}"

    @property
    def metrics_address(self) -> str:
        """HOST:PORT of its metrics and health, in plain HTTP."""
        return f"{HOST}:{self.metrics_port}"

    def metrics(self) -> str:
        """Its metrics in Prometheus' text format."""
        with urlopen(f"http://{self.metrics_address}/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    def replicas_up(self) -> int:
        """Servers that pass the health check."""
        with contextlib.suppress(URLError, ConnectionError):
            for line in self.metrics().splitlines():
                if line.startswith('haproxy_backend_active_servers{proxy="triton"}'):
                    return int(float(line.split()[-1]))
        return 0

    def await_replicas(self, count: int) -> None:
        """Return once it sends to exactly so many servers."""
        wait_until(lambda: self.replicas_up() == count, f"{count} replicas at the balancer")


def free_ports(count: int, hosts: tuple[str, ...] = (HOST,)) -> list[int]:
    """Ports that are free on every one of the hosts."""
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            probes = [held.enter_context(socket.socket()) for _ in hosts]
            probes[0].bind((hosts[0], 0))
            port = probes[0].getsockname()[1]
            with contextlib.suppress(OSError):
                for probe, host in zip(probes[1:], hosts[1:], strict=True):
                    probe.bind((host, port))
                ports.append(port)
        return ports


def replica_settings(repository: Path, count: int, **settings: object) -> list[ServeSettings]:
    """Settings for servers on loopback addresses of their own, with the same ports, as pods or containers have them."""
    hosts = tuple(f"127.0.0.{number}" for number in range(2, 2 + count))
    grpc, http, metrics = free_ports(3, hosts)
    ports = {"grpc_port": grpc, "http_port": http, "metrics_port": metrics}
    # 2.51 keeps an ensemble loaded whose requests were broken off, and ends only after its whole exit timeout.
    quick = {"stop_grace_s": 4.0}
    return [ServeSettings(repository, host=host, **{**ports, **quick, **settings}) for host in hosts]  # type: ignore[arg-type]


@contextmanager
def balancer(
    servers: list[ServeSettings], folder: Path, certificates: Certificates | None = None, **changed: str
) -> Iterator[Balancer]:
    """Run the deployment's balancer in front of servers, which need not run yet. ``changed``: settings of its own."""
    grpc_port, metrics_port, dns_port = free_ports(3)
    names = Names([server.host for server in servers])
    dns = DNSServer(names, address=HOST, port=dns_port, logger=DNSLogger("-request,-reply"))
    certificates = certificates or Certificates.issue(folder)
    log_file = folder / "haproxy.log"
    variables = {
        **environment(),
        "LB_FOLDER": str(CONFIGURATION.parent),
        "LB_BIND": f"{HOST}:{grpc_port}",
        "LB_METRICS_BIND": f"{HOST}:{metrics_port}",
        "LB_CERT": str(certificates.server),
        "LB_CLIENT_CA": str(certificates.ca),
        "LB_DNS": f"{HOST}:{dns_port}",
        "TRITON_GRPC_PORT": str(servers[0].grpc_port),
        "TRITON_HTTP_PORT": str(servers[0].http_port),
        **changed,
    }
    with ExitStack() as running:
        dns.start_thread()
        running.callback(dns.server.server_close)
        running.callback(dns.stop)
        log = running.enter_context(log_file.open("ab"))
        process = subprocess.Popen(
            [program("haproxy"), "-db", "-f", str(CONFIGURATION)],
            env=variables,
            stdout=log,
            stderr=log,
        )
        running.callback(process.wait, 10)
        running.callback(process.kill)
        yield Balancer(process, grpc_port, metrics_port, names, log_file, certificates)


@contextmanager
def deployment(
    repository: Path, folder: Path, replicas: int = 2, **changed: str
) -> Iterator[tuple[Balancer, list[EmbeddedTriton]]]:
    """Servers behind the balancer, all ready."""
    logs = [folder / f"triton-{number}.log" for number in range(1, replicas + 1)]
    settings = [
        replace(server, log_file=log) for server, log in zip(replica_settings(repository, replicas), logs, strict=True)
    ]
    with ExitStack() as running:
        servers = [running.enter_context(EmbeddedTriton(server)) for server in settings]
        front = running.enter_context(balancer(settings, folder, **changed))
        front.await_replicas(replicas)
        yield front, servers
