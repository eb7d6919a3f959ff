"""What docker-compose.yml runs for its servers, run here with the embedded server: options, health check, key."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from balancer import free_ports
from compose_file import command_of, make_secrets, on_host, services
from groundglass.contract import CT_SCAN, SCAN_AGGREGATOR
from groundglass_ensemble.keeper import kill_group, remove_shared_memory
from groundglass_ensemble.wheel import assemble_backends, find_wheel, server_environment

HEADER = "groundglass-key"
SERVER = services()["triton-cpu"]


@dataclass
class Server:
    """A server as compose starts it."""

    process: subprocess.Popen[bytes]
    grpc_port: int
    http_port: int
    log_file: Path
    key_file: Path

    @property
    def key(self) -> str:
        """What it asks for before models are loaded."""
        return self.key_file.read_text().strip()

    def health(self) -> subprocess.CompletedProcess[str]:
        """Run compose's health check on it."""
        kind, python, *words = SERVER["healthcheck"]["test"]
        assert (kind, python, words[-2:]) == ("CMD", "python3", ["--end-broken", "1"])  # there, all ends with process 1
        command = [sys.executable, *words[:-1], str(self.process.pid), f"localhost:{self.grpc_port}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def await_health(self) -> None:
        """Return once it is healthy."""
        deadline_s = time.monotonic() + 60
        while (last := self.health()).returncode:
            assert self.process.poll() is None, self.log_file.read_text()
            assert time.monotonic() < deadline_s, last.stderr
            time.sleep(0.2)

    def stage_process(self, name: str) -> psutil.Process:
        """The process of a Python stage."""
        (found,) = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if any(f"/{name}/" in word for word in child.cmdline())
        ]
        return found


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that make_certificates.sh fills."""
    return make_secrets(tmp_path_factory.mktemp("deployment") / "secrets")


@contextmanager
def served(repository: Path, secrets: Path, folder: Path) -> Iterator[Server]:
    """Run the CPU server's entrypoint and command, with what differs here: ports, backends, places of files."""
    wheel = find_wheel()
    grpc_port, http_port, metrics_port = free_ports(3)
    prefix = f"groundglass_compose_{os.getpid()}_{grpc_port}_"
    here = {"MODEL_REPOSITORY": str(repository)}
    for variable, value in SERVER["environment"].items():
        here[variable] = value.replace("/run/secrets", str(secrets))
    variables = {**server_environment(wheel), **here}
    variables["PATH"] = f"{wheel.server.parent}{os.pathsep}{variables['PATH']}"
    program_file, *words = command_of(SERVER)
    command = [
        *(str(on_host(SERVER, program_file)), *words),
        *("--grpc-address=127.0.0.1", f"--grpc-port={grpc_port}"),
        *("--http-address=127.0.0.1", f"--http-port={http_port}", f"--metrics-port={metrics_port}"),
        f"--backend-directory={assemble_backends(wheel, folder / 'backends')}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        "--exit-timeout-secs=2",  # a server whose stage is dead waits for it in vain
    ]
    log_file = folder / "log"
    with ExitStack() as running:
        log = running.enter_context(log_file.open("wb"))
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        running.callback(remove_shared_memory, prefix)
        running.callback(process.wait, 30)
        running.callback(kill_group, process.pid)
        server = Server(process, grpc_port, http_port, log_file, secrets / "control.key")
        server.await_health()
        yield server


@pytest.fixture(scope="module")
def server(probe_repository: Path, secrets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for the tests that leave it as it is."""
    with served(probe_repository, secrets, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    """A client of it, without a key."""
    with triton.InferenceServerClient(f"localhost:{server.grpc_port}") as connected:
        yield connected


def tools(server: Server, key_file: Path, repository: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    """Run the service ``tools`` as compose does, with names and places of this machine."""
    service = services()["tools"]
    variables = {
        **os.environ,
        **service["environment"],
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TRITON_HOST": "localhost",
        "TRITON_GRPC_PORT": str(server.grpc_port),
        "CONTROL_KEY_FILE": str(key_file),
        "GROUNDGLASS_REPOSITORY": str(repository),
        **changed,
    }
    program_file, *words = command_of(service)
    command = [str(on_host(service, program_file)), *words]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


@pytest.mark.triton
def test_the_health_check_infers(probe_repository: Path, secrets: Path, tmp_path: Path) -> None:
    """Healthy while the whole flow works. With its last stage dead it is unhealthy, and ends, to be started again."""
    with served(probe_repository, secrets, tmp_path) as server:
        healthy = server.health()
        assert (healthy.returncode, healthy.stdout, healthy.stderr) == (0, "", "")
        server.stage_process(SCAN_AGGREGATOR.name).kill()
        unhealthy = server.health()
        assert unhealthy.returncode == 1
        assert re.fullmatch(r"localhost:\d+ does not infer through ct_scan: .+\n", unhealthy.stderr)
        server.process.wait(60)
        gone = server.health()
        assert gone.returncode == 1
        assert len(gone.stderr.splitlines()) == 1


@pytest.mark.triton
def test_control_asks_for_the_key(server: Server, client: triton.InferenceServerClient) -> None:
    """Models, trace, log and shared memory settings are refused without the key and with another, and taken with it."""
    calls = (
        lambda headers: client.load_model(CT_SCAN.name, headers=headers),
        lambda headers: client.get_model_repository_index(headers=headers),
        lambda headers: client.get_trace_settings(headers=headers),
        lambda headers: client.get_log_settings(headers=headers),
        lambda headers: client.get_system_shared_memory_status(headers=headers),
    )
    for call in calls:
        for headers in ({}, {f"triton-grpc-protocol-{HEADER}": "another"}):
            with pytest.raises(InferenceServerException, match=f"expecting header 'triton-grpc-protocol-{HEADER}'"):
                call(headers)
        call({f"triton-grpc-protocol-{HEADER}": server.key})


@pytest.mark.triton
def test_control_over_http_asks_for_it_as_well(server: Server) -> None:
    """HTTP is no way around the key."""
    url = f"http://127.0.0.1:{server.http_port}/v2/repository/models/{CT_SCAN.name}/load"
    with pytest.raises(HTTPError, match="403"):
        urlopen(Request(url, data=b"{}", method="POST"), timeout=30)
    with urlopen(Request(url, data=b"{}", headers={HEADER: server.key}, method="POST"), timeout=30) as answer:
        assert answer.status == 200


@pytest.mark.triton
def test_analysis_needs_no_key(client: triton.InferenceServerClient) -> None:
    """Health, metadata, configuration and statistics are open, as inference is to the health check."""
    assert client.is_server_ready()
    assert client.is_model_ready(CT_SCAN.name)
    assert client.get_model_metadata(CT_SCAN.name).name == CT_SCAN.name
    assert client.get_model_config(CT_SCAN.name).config.name == CT_SCAN.name
    assert client.get_inference_statistics(CT_SCAN.name).model_stats


@pytest.mark.triton
def test_the_key_is_not_logged(server: Server) -> None:
    """The server prints its options when it starts; the key is not among them."""
    text = server.log_file.read_text()
    assert "Started GRPCInferenceService" in text
    assert server.key not in text


@pytest.mark.triton
def test_tools_reach_every_replica_with_the_key(server: Server, secrets: Path, probe_repository: Path) -> None:
    """``tools`` finds the servers by name and shows the key; another one opens nothing, and none is an error."""
    done = tools(server, secrets / "control.key", probe_repository)
    assert done.returncode == 0, done.stderr
    assert f"127.0.0.1:{server.grpc_port}" in done.stdout
    assert "asks for a key" not in done.stdout
    wrong = tools(server, secrets / "grafana.password", probe_repository)
    assert f"127.0.0.1:{server.grpc_port} asks for a key" in wrong.stdout
    for changed, message in (
        ({"CONTROL_KEY_FILE": str(secrets / "none")}, f"CONTROL_KEY_FILE: '{secrets}/none' can't be read"),
        ({"TRITON_HOST": "nobody.invalid"}, "nobody.invalid has no address here"),
    ):
        failed = tools(server, secrets / "control.key", probe_repository, **changed)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert message in failed.stderr
