"""The probe as health checks call it, as a program, on a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from balancer import free_ports
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings


def probe(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it."""
    command = [sys.executable, "-m", "groundglass_ensemble.probe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.triton
@pytest.mark.parametrize("model", ["ct_scan", "scan_aggregator"])
def test_a_server_that_infers_is_healthy(probe_server: EmbeddedTriton, model: str) -> None:
    """An answered inference is exit code 0 and no word, through the whole flow as through its last stage."""
    done = probe(probe_server.grpc_address, "--model", model)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.triton
def test_a_server_without_the_flow_is_not_healthy(tmp_path: Path) -> None:
    """A server that lives and serves something else does not pass, though it says that it is ready."""
    with EmbeddedTriton(ServeSettings(tmp_path)) as empty:
        done = probe(empty.grpc_address)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{empty.grpc_address} does not infer through ct_scan: ")


def test_no_server_is_one_line() -> None:
    """Where nobody listens, the exit code is 1 and one line says so; a process to end is left alone."""
    (port,) = free_ports(1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        done = probe(f"127.0.0.1:{port}", "--timeout-s", "5", "--end-broken", str(other.pid))
        assert other.poll() is None
        other.communicate(b"\n", timeout=30)
        assert other.returncode == 0
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"127.0.0.1:{port} does not infer through ct_scan: ")
