"""The deployment's balancer, as its clients and those who mean it harm meet it."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import h2.config
import h2.connection
import h2.events
import h2.settings
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from balancer import HOST, Balancer, Certificates, balancer, deployment, replica_settings
from calls import infer_inputs, scan_rows
from client_study import QUICK, Decoder, study_of
from groundglass import contract
from groundglass.errors import ServerUnreachable
from groundglass.tls import TlsSettings
from groundglass_client.connection import connect
from groundglass_client.session import analyse
from groundglass_ensemble.embedded import EmbeddedTriton
from waiting import wait_until

pytestmark = pytest.mark.triton

PROJECT = Path(__file__).parents[2]

STRANGER = "127.0.0.99"
"""Another address of this machine, for those who mean harm."""

INFER = "/inference.GRPCInferenceService/ModelInfer"
POSITIVES = [10 <= index < 30 for index in range(60)]


@pytest.fixture(scope="module")
def stack(
    probe_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Balancer, list[EmbeddedTriton]]]:
    """Two servers behind the balancer. One address may hold 40 connections, a message 5 MiB."""
    folder = tmp_path_factory.mktemp("balancer")
    limits = {"LB_CONNECTIONS_PER_CLIENT": "40", "LB_MAX_MESSAGE_BYTES": str(5 << 20)}
    with deployment(probe_repository, folder, **limits) as running:
        yield running


@pytest.fixture
def front(stack: tuple[Balancer, list[EmbeddedTriton]]) -> Balancer:
    """The balancer."""
    return stack[0]


def client_of(front: Balancer, **options: Any) -> triton.InferenceServerClient:
    """A plain Triton client that trusts the deployment's authority."""
    return triton.InferenceServerClient(
        front.grpc_address, ssl=True, root_certificates=str(front.certificates.ca), **options
    )


def assert_served(front: Balancer, tls: TlsSettings | None = None) -> None:
    """A client gets its study analysed."""
    with connect(front.grpc_address, tls=tls or TlsSettings(ca=front.certificates.ca)) as transport:
        report = analyse(study_of(60), transport, Decoder(POSITIVES), QUICK).report
    assert [result.positive for result in report.slices] == POSITIVES
    assert (report.longest_run, report.scan_positive) == (20, True)


def tls_socket(front: Balancer, source: str, **context: Any) -> ssl.SSLSocket:
    """A TLS connection from an address of this machine, ready for HTTP/2."""
    settings = ssl.create_default_context(cafile=front.certificates.ca)
    settings.set_alpn_protocols(["h2"])
    for name, value in context.items():
        setattr(settings, name, value)
    plain = socket.create_connection((HOST, front.grpc_port), timeout=10, source_address=(source, 0))
    return settings.wrap_socket(plain, server_hostname=HOST)


@pytest.mark.parametrize(
    "method",
    [
        *("RepositoryModelLoad", "RepositoryModelUnload", "RepositoryIndex"),
        *("SystemSharedMemoryRegister", "SystemSharedMemoryStatus", "CudaSharedMemoryRegister"),
        *("TraceSetting", "LogSettings", "ModelStreamInfer"),
    ],
)
def test_what_is_not_analysis_stays_inside(front: Balancer, method: str) -> None:
    """Loading, unloading, shared memory and the server's own settings are refused, with or without a key."""
    ca = front.certificates.ca.read_bytes()
    for metadata in ((), (("triton-grpc-protocol-groundglass-key", "secret"),)):
        with grpc.secure_channel(front.grpc_address, grpc.ssl_channel_credentials(ca)) as channel:
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=10, metadata=metadata)
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert "not served through the balancer" in refused.value.details()


def test_what_a_client_asks_before_it_sends_is_answered(front: Balancer) -> None:
    """Liveness, readiness, metadata, configuration and statistics pass."""
    with client_of(front) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(contract.CT_SCAN.name)
        assert client.get_server_metadata().name
        assert client.get_model_metadata(contract.CT_SCAN.name).name == contract.CT_SCAN.name
        assert client.get_model_config(contract.CT_SCAN.name).config.name == contract.CT_SCAN.name
        assert client.get_inference_statistics().model_stats


def test_plain_text_is_refused(front: Balancer) -> None:
    """Without TLS there is no answer, neither to gRPC nor to HTTP/1.1."""
    with triton.InferenceServerClient(front.grpc_address) as client, pytest.raises(InferenceServerException):
        client.is_server_live(client_timeout=5)
    with socket.create_connection((HOST, front.grpc_port), timeout=10) as plain:
        plain.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: balancer\r\n\r\n")
        assert plain.recv(1) == b""


def test_old_tls_and_old_http_are_refused(front: Balancer) -> None:
    """TLS below 1.2 is not spoken, and HTTP/1.1 over TLS neither."""
    with pytest.warns(DeprecationWarning, match="TLSv1"), pytest.raises(ssl.SSLError):
        tls_socket(front, HOST, minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1)
    context = ssl.create_default_context(cafile=front.certificates.ca)
    plain = socket.create_connection((HOST, front.grpc_port), timeout=10)
    with context.wrap_socket(plain, server_hostname=HOST) as spoken:
        spoken.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: balancer\r\n\r\n")
        assert spoken.recv(1) == b""


def test_mutual_tls_asks_for_a_certificate(
    stack: tuple[Balancer, list[EmbeddedTriton]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With mutual TLS who shows a certificate of the right authority is served; without, or of another, nobody is."""
    settings = [server.settings for server in stack[1]]
    stranger = Certificates.issue(tmp_path_factory.mktemp("stranger"))
    with balancer(settings, tmp_path, LB_MUTUAL_TLS="required") as front:
        front.await_replicas(2)
        mine = front.certificates
        assert_served(front, TlsSettings(ca=mine.ca, certificate=mine.client, key=mine.client_key))
        for options in (
            {},
            {"certificate_chain": str(stranger.client), "private_key": str(stranger.client_key)},
        ):
            with client_of(front, **options) as client, pytest.raises(InferenceServerException, match="UNAVAILABLE"):
                client.is_server_live(client_timeout=5)


def test_an_oversized_message_is_refused_with_its_reason(front: Balancer) -> None:
    """A message over the limit is RESOURCE_EXHAUSTED and names the setting; one below it is computed."""
    with client_of(front) as client:
        for side, fits in ((512, True), (2048, False), (512, True)):
            rows = scan_rows(b"", [0], [False])
            rows[contract.HU.name] = np.full((1, side, side), -1000, np.int16)
            inputs = infer_inputs(rows)
            if fits:
                client.infer(contract.CT_SCAN.name, inputs, client_timeout=20)
                continue
            with pytest.raises(InferenceServerException, match="LB_MAX_MESSAGE_BYTES") as refused:
                client.infer(contract.CT_SCAN.name, inputs, client_timeout=20)
            assert "RESOURCE_EXHAUSTED" in str(refused.value)


def test_a_flood_of_half_open_connections_harms_no_client(front: Balancer) -> None:
    """Connections that never finish, or never begin, TLS are limited by address and gone after a while."""
    with ExitStack() as held:
        flood = []
        for _ in range(200):
            half = held.enter_context(socket.socket())
            half.bind((STRANGER, 0))
            half.settimeout(30)
            with suppress(OSError):  # refused already
                half.connect((HOST, front.grpc_port))
            flood.append(half)
        for half in flood[::2]:
            with_hello(half)
        assert_served(front)
        wait_until(lambda: sum(map(is_closed, flood)) >= 160, "the balancer to refuse what is too much", 5)
    assert_served(front)


def with_hello(half: socket.socket) -> None:
    """Begin TLS, and leave it at that."""
    with suppress(OSError):  # refused already
        half.sendall(bytes.fromhex("16030100c8010000c40303"))


def is_closed(half: socket.socket) -> bool:
    """Whether the other side has ended the connection."""
    half.setblocking(False)
    try:
        return half.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_slow_readers_harm_no_client(front: Balancer) -> None:
    """Clients that ask for masks and never read them hold up nobody else's answers."""
    with ExitStack() as held:
        for _ in range(20):
            ask_and_never_read(held.enter_context(tls_socket(front, STRANGER)))
        started = time.monotonic()
        for _ in range(3):
            assert_served(front)
        assert time.monotonic() - started < 25, "answers came when the slow readers were thrown out"


def ask_and_never_read(spoken: ssl.SSLSocket) -> None:
    """Send an inference whose answer may not flow: the stream's window is closed."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    connection.initiate_connection()
    connection.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
    connection.send_headers(1, headers_of_a_call())
    spoken.sendall(connection.data_to_send())
    body = message(16)
    while body:
        room = min(connection.local_flow_control_window(1), connection.max_outbound_frame_size, len(body))
        if room:
            connection.send_data(1, body[:room], end_stream=room == len(body))
            body = body[room:]
            spoken.sendall(connection.data_to_send())
        else:
            connection.receive_data(spoken.recv(65536))
            spoken.sendall(connection.data_to_send())


def headers_of_a_call() -> list[tuple[str, str]]:
    """HTTP/2 headers of a gRPC call to ModelInfer."""
    return [
        *((":method", "POST"), (":scheme", "https"), (":path", INFER), (":authority", HOST)),
        *(("te", "trailers"), ("content-type", "application/grpc")),
    ]


def message(slice_count: int) -> bytes:
    """A length-prefixed ModelInfer request for every output of so many slices."""
    inputs = infer_inputs(scan_rows(b"", range(slice_count), [False] * slice_count))
    request = service_pb2.ModelInferRequest(
        model_name=contract.CT_SCAN.name,
        inputs=[tensor._get_tensor() for tensor in inputs],
        raw_input_contents=[tensor._get_content() for tensor in inputs],
    ).SerializeToString()
    return b"\0" + len(request).to_bytes(4, "big") + request


def test_what_the_balancer_costs_can_be_measured(stack: tuple[Balancer, list[EmbeddedTriton]], tmp_path: Path) -> None:
    """The benchmark sends the same to a server and through the balancer, and writes both paces and the CPU time."""
    front, servers = stack
    script = [sys.executable, str(PROJECT / "benchmarks" / "balancer_cost.py"), "--slices", "16", "--repetitions", "1"]
    where = ["--server", servers[0].grpc_address, "--balancer", front.grpc_address, "--tls-ca"]
    for options in (["--pid", str(front.process.pid)], ["--pid", "0x"], ["--server", "nowhere"]):
        done = subprocess.run(
            [*script, *where, str(front.certificates.ca), "--out", str(tmp_path), *options],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if options[1] == str(front.process.pid):
            assert done.returncode == 0, done.stderr
            found = json.loads((tmp_path / "balancer.json").read_text())
            assert set(found["slices_per_s"]) == {"one server", "through the balancer"}
            assert found["balancer_cpu_s_per_gib"] > 0
        else:
            assert done.returncode != 0
            assert options[0].strip("-") in done.stderr


def test_health_follows_the_servers(probe_repository: Path, tmp_path: Path) -> None:
    """Without a server that infers the balancer says 503; names that are taken back are left; a dead stage is seen."""
    settings = replica_settings(probe_repository, 2)
    with balancer(settings, tmp_path) as front:
        wait_until(lambda: health(front) == 503, "the balancer to start")
        tls = TlsSettings(ca=front.certificates.ca)
        with (
            connect(front.grpc_address, tls=tls) as transport,
            pytest.raises(ServerUnreachable, match="no server behind"),
        ):
            transport.describe(5)
        with EmbeddedTriton(settings[1]):
            front.await_replicas(1)
            assert health(front) == 200
            assert_served(front)
            front.names.addresses.remove(settings[1].host)
            front.await_replicas(0)
            assert health(front) == 503


def health(front: Balancer) -> int:
    """HTTP status of the health page; 0 while nobody listens."""
    try:
        with urlopen(f"http://{front.metrics_address}/healthz", timeout=5) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code
    except OSError:
        return 0
