"""The probes of the Kubernetes pods, run as the kubelet runs them, on a server whose Python stage hangs or dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
import yaml

from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings

pytestmark = pytest.mark.triton

TRITON = Path(__file__).parents[2] / "deploy" / "kubernetes" / "base" / "triton.yaml"
DEPLOYMENT = next(yaml.safe_load_all(TRITON.read_text()))
(CONTAINER,) = DEPLOYMENT["spec"]["template"]["spec"]["containers"]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
HEALTH = ("/v2/health/live", "/v2/health/ready", "/v2/models/ct_scan/ready", "/v2/models/scan_aggregator/ready")


@pytest.fixture
def server(probe_repository: Path) -> Iterator[EmbeddedTriton]:
    """A server of one's own, to be broken."""
    with EmbeddedTriton(ServeSettings(probe_repository, stop_grace_s=3)) as running:
        yield running


def probe(name: str, server: EmbeddedTriton) -> subprocess.CompletedProcess[str]:
    """Run a probe's command within its time limit; its address is the pod's own, here a free port."""
    (python, *arguments) = CONTAINER[name]["exec"]["command"]
    assert python == "python3"
    command = [sys.executable, *arguments, server.grpc_address]
    return subprocess.run(command, capture_output=True, text=True, timeout=CONTAINER[name]["timeoutSeconds"])


def stage_process(server: EmbeddedTriton) -> psutil.Process:
    """The Python process of scan_aggregator, the only one that a server with NVIDIA's own backends has."""
    (stage,) = [
        process
        for process in psutil.Process(server.pid).children(recursive=True)
        if "scan_aggregator/1/model.py" in " ".join(process.cmdline())
    ]
    return stage


def says_it_is_well(server: EmbeddedTriton) -> bool:
    """What the server says of itself."""
    return all(urlopen(f"http://{server.http_address}{path}", timeout=5).status == 200 for path in HEALTH)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hung"])
def test_a_broken_stage_is_noticed(server: EmbeddedTriton, number: signal.Signals) -> None:
    """All probes pass on a sound server, and fail once its Python stage is gone or hangs, unseen by the server."""
    assert {name: probe(name, server).returncode for name in PROBES} == dict.fromkeys(PROBES, 0)
    os.kill(stage_process(server).pid, number)
    failed = {name: probe(name, server) for name in PROBES}
    assert {name: done.returncode for name, done in failed.items()} == dict.fromkeys(PROBES, 1)
    assert all(len(done.stderr.splitlines()) == 1 for done in failed.values())
    assert says_it_is_well(server)


def test_a_broken_server_is_not_waited_for() -> None:
    """A restart by the liveness probe is at once: neither preStop nor the server's exit timeout holds it up."""
    assert CONTAINER["livenessProbe"]["terminationGracePeriodSeconds"] <= 10


def test_no_probe_but_the_first_waits_behind_the_network() -> None:
    """Readiness and liveness ask the last stage alone, liveness more patiently, and only the start runs the network."""
    commands = {name: " ".join(CONTAINER[name]["exec"]["command"]) for name in PROBES}
    assert {name: "--model scan_aggregator" in command for name, command in commands.items()} == {
        "startupProbe": False,
        "readinessProbe": True,
        "livenessProbe": True,
    }
    patience_s = {name: CONTAINER[name]["periodSeconds"] * CONTAINER[name]["failureThreshold"] for name in PROBES}
    assert patience_s["readinessProbe"] < patience_s["livenessProbe"] < patience_s["startupProbe"]
