"""Loads on a real Triton with the probe network, each sent by locust in processes of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import psutil
import pytest

from groundglass_bench.load import Load, run_load
from groundglass_bench.load.samples import read_record
from groundglass_ensemble.embedded import EmbeddedTriton
from waiting import wait_until

pytestmark = pytest.mark.triton

PROJECT = Path(__file__).parents[2]
LOCUST = [sys.executable, "-m", "locust", "-f", "benchmarks/locustfile.py"]


def locust(*options: object) -> subprocess.CompletedProcess[str]:
    """The locustfile as a person calls it."""
    command = [*LOCUST, "--headless", "--only-summary", *map(str, options)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)


def test_users_of_a_closed_loop_are_answered_rightly_at_the_same_time(probe_server: EmbeddedTriton) -> None:
    """Two users' studies overlap, all verdicts are right, and sizes are those asked for."""
    result = run_load(Load(users=2, slices=(16, 48), duration_s=2.0, warm_up_s=0.5), probe_server.grpc_address)
    assert len(result.samples) > 2
    assert result.failures == {}
    assert result.most_in_flight == 2
    assert {16 <= sample.slices <= 48 for sample in result.recorded} == {True}
    assert all(sum(slices for _, slices in sample.answers) == sample.slices for sample in result.recorded)
    assert all(sample.intended_s >= result.window[0] for sample in result.samples)
    assert min(sample.intended_s for sample in result.recorded) < result.window[0]
    assert result.latency_s(50) <= result.latency_s(100) == max(sample.seconds for sample in result.samples)


def test_several_processes_share_a_load(probe_server: EmbeddedTriton) -> None:
    """Three users in two processes are one load, with plain gRPC and masks too."""
    load = Load(users=3, processes=2, slices=24, duration_s=1.5, masks=True, shared_memory=False)
    result = run_load(load, probe_server.grpc_address)
    assert result.failures == {}
    assert result.most_in_flight == 3


def test_an_open_loop_keeps_its_arrivals_whatever_the_server_does(probe_server: EmbeddedTriton) -> None:
    """Arrivals are the seed's, to the microsecond, and those above the bound in flight are counted as failures."""
    load = Load(loop="open", rate_per_s=60.0, slices=64, duration_s=2.0, max_in_flight=2, seed=7)
    result = run_load(load, probe_server.grpc_address)
    gaps = np.diff([sample.intended_s for sample in result.recorded])
    expected = np.random.default_rng([7, 0, 0]).spawn(2)[1].exponential(1 / 60.0, size=len(gaps) + 1)
    np.testing.assert_allclose(gaps, expected[1:], atol=2e-6)
    refused = result.failures.pop("refused by the generator: 2 studies in flight")
    assert refused > 0
    assert sum(sample.ok for sample in result.samples) == len(result.samples) - refused > 0
    assert result.most_in_flight == 2


def test_latency_counts_from_the_intended_start(probe_server: EmbeddedTriton) -> None:
    """A study that the generator sends five seconds late has these in its latency."""
    program = """
import sys
import numpy as np
from groundglass_bench.load import Load
from groundglass_bench.load.sources import Sender
from groundglass_bench.load.studies import Phantoms

samples = []
sender = Sender(sys.argv[1], Load(slices=8), Phantoms(8), samples.append, np.random.default_rng(0))
assert sender.send(8, sender.now_s() - 5.0)
sender.close()
sample = samples[0]
assert sample.ok and sample.seconds > sample.started_s - sample.intended_s >= 5.0, sample
"""
    command = [sys.executable, "-c", program, probe_server.grpc_address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_wrong_verdict_is_a_failure(probe_server: EmbeddedTriton) -> None:
    """Every study whose longest run isn't the expected one fails, with both in its reason."""
    result = run_load(Load(slices=48, duration_s=1.0, expected_run=7), probe_server.grpc_address)
    assert not any(sample.ok for sample in result.recorded)
    assert "wrong verdict: positive with a longest run of 20, expected 7" in next(iter(result.failures))


def test_the_documented_command_line_works(probe_server: EmbeddedTriton, tmp_path: Path) -> None:
    """Headless, an open loop, cut off at its end: the process ends, and every study has its sample."""
    samples = tmp_path / "samples.json"
    options = ("--loop", "open", "--rate", 8, "--slices", "16..64", "--run-time", "4s", "--samples", samples)
    done = locust("--host", probe_server.grpc_address, *options)
    assert "gRPC     study" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    record = read_record(samples)
    assert any(sample.ok for sample in record.samples)
    errors = {sample.error for sample in record.samples if not sample.ok}
    assert errors <= {"cut off: the load ended before the report came"}
    assert done.returncode == (1 if errors else 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--slices", "none"), "slices 'none': expected a number, or a range such as 100..4000"),
        (("--loop", "open"), "an open loop needs its rate"),
        (("--users", 0), "users 0: expected 1 or more"),
        (("--host", "127.0.0.1:9"), "127.0.0.1:9"),
        (("--samples", "/proc/nowhere/samples.json"), "--samples /proc/nowhere/samples.json: "),
        (("--host", "nowhere"), "expected HOST:PORT"),
        (("--host", ""), "no server: give --host HOST:PORT"),
    ],
)
def test_bad_input_is_one_clear_line(probe_server: EmbeddedTriton, options: tuple[object, ...], words: str) -> None:
    """What can't be sent ends locust before the load, with one line of ours."""
    done = locust("--host", probe_server.grpc_address, "--run-time", "2s", *options)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("groundglass: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in done.stderr


def test_the_web_page_starts_a_load(probe_server: EmbeddedTriton) -> None:
    """Host and slices from the page's form are used; a form that can't be used says so in the log and sends nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = f"http://127.0.0.1:{port}"

    def ask(path: str, **form: object) -> str:
        data = urlencode(form).encode() if form else None
        with urllib.request.urlopen(f"{page}{path}", data, timeout=10) as answer:  # noqa: S310
            return str(answer.read().decode())

    def requests() -> int:
        return int(json.loads(ask("/stats/requests"))["stats"][-1]["num_requests"])

    def serves() -> bool:
        try:
            return "locust" in ask("/").lower()
        except OSError:
            return False

    process = subprocess.Popen(
        [*LOCUST, "--web-host", "127.0.0.1", "--web-port", str(port)], cwd=PROJECT, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(serves, "the web page")
        form = {"user_count": 2, "spawn_rate": 2, "host": probe_server.grpc_address}
        ask("/swarm", **form, slices="many")
        wait_until(lambda: json.loads(ask("/stats/requests"))["state"] == "stopped", "the load to stop")
        assert requests() == 0
        ask("/swarm", **form, slices="16..24")
        wait_until(lambda: requests() > 2, "requests")
        assert json.loads(ask("/stats/requests"))["errors"] == []
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert "slices 'many': expected a number" in log
    assert "Traceback" not in log


def test_an_interrupted_load_leaves_no_process(probe_server: EmbeddedTriton) -> None:
    """Ctrl-C in the middle of a load ends the generator's processes before the caller goes on."""
    program = """
import signal, sys
from groundglass_bench.load import Load, run_load
signal.signal(signal.SIGINT, signal.default_int_handler)
run_load(Load(users=2, processes=2, slices=24, duration_s=60.0), sys.argv[1])
"""
    command = [sys.executable, "-c", program, probe_server.grpc_address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as caller:
        wait_until(lambda: len(psutil.Process(caller.pid).children()) == 2, "two processes")
        children = psutil.Process(caller.pid).children()
        port = int(probe_server.grpc_address.rpartition(":")[2])
        wait_until(lambda: all(_connected(child, port) for child in children), "their connections")
        caller.send_signal(signal.SIGINT)
        _, errors = caller.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert not any(child.is_running() for child in children)


def _connected(process: psutil.Process, port: int) -> bool:
    return any(link.raddr and link.raddr.port == port for link in process.net_connections())
