"""Whole studies through a real Triton with the probe network: right verdicts, in bounded memory, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import probe_network
from groundglass.errors import ServerRefused, ServerUnreachable
from groundglass.finding import fold
from groundglass.study import Series, SliceSource, Study
from groundglass_client.intake import decode_hu, open_study
from groundglass_client.phantom import PhantomSettings, write_phantom
from groundglass_client.session import SessionSettings, analyse
from groundglass_client.transport import GrpcTransport
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings

pytestmark = pytest.mark.triton

SIDE = 32
MEMORY_BOUND_MB = 300
GROUNDGLASS = [sys.executable, "-m", "groundglass"]


def described_study(slice_count: int) -> Study:
    """A study whose slices are made when they are decoded."""
    slices = tuple(
        SliceSource(index, Path(f"{index}.dcm"), f"{index}.dcm", 0, SIDE, SIDE, -2.0 * index)
        for index in range(slice_count)
    )
    series = Series("CT", None, 1, slice_count, SIDE, SIDE, None, (0.7, 0.7), 2.0, 0.0)
    return Study(Path("study"), series, slices)


class Made:
    """Decodes to slices that the probe network calls positive where asked."""

    def __init__(self, positives: list[bool]) -> None:
        self.hu = probe_network.slices(positives, SIDE)

    def __call__(self, source: SliceSource) -> NDArray[np.int16]:
        return self.hu[source.index]


def expected_pixels(hu: NDArray[np.int16]) -> int:
    """Lesion pixels that the probe network finds in a slice of 512x512."""
    return int((hu >= probe_network.LESION_HU).sum())


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.booleans(), min_size=1, max_size=70), st.integers(1, 20), st.integers(1, 6))
def test_any_chunking_and_window_gives_the_fold_of_the_slices(
    probe_server: EmbeddedTriton, positives: list[bool], chunk: int, window: int
) -> None:
    """However a scan is cut and however many requests overtake each other, the served verdict is the fold's."""
    how = SessionSettings(chunk_bytes=chunk * SIDE * SIDE * 2, window=window)
    with GrpcTransport(probe_server.grpc_address) as transport:
        report = analyse(described_study(len(positives)), transport, Made(positives), how).report
    expected = fold(enumerate(positives), len(positives))
    assert [result.positive for result in report.slices] == positives
    assert (report.longest_run, report.scan_positive) == (expected.longest_run, expected.positive)


def test_two_processes_analyse_two_studies_at_once(probe_server: EmbeddedTriton, tmp_path: Path) -> None:
    """Two studies sent at the same time by two processes each get their own slices and verdict."""
    studies = [tmp_path / "a", tmp_path / "b"]
    for seed, (study, slices) in enumerate(zip(studies, (24, 31), strict=True)):
        write_phantom(PhantomSettings(slices=slices, seed=seed), study)
    running = [
        subprocess.Popen(
            [*GROUNDGLASS, "analyze", str(study), "--server", probe_server.grpc_address, "--json", "-"],
            stdout=subprocess.PIPE,
        )
        for study in studies
    ]
    for study, process in zip(studies, running, strict=True):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        report = json.loads(output)
        with open_study(study) as opened:
            pixels = [expected_pixels(decode_hu(source)) for source in opened.slices]
        assert [item["lesion_pixels"] for item in report["slices"]] == pixels


@pytest.mark.slow
def test_a_thousand_slices_in_bounded_memory(probe_server: EmbeddedTriton, tmp_path: Path) -> None:
    """A phantom of 1,000 slices is answered slice by slice as it must, and the client grows by less than 300 MB."""
    write_phantom(PhantomSettings(slices=1000, seed=5), tmp_path / "study")
    program = """
import resource, sys
from pathlib import Path
from groundglass_client.intake import decode_hu, open_study
from groundglass_client.session import analyse
from groundglass_client.transport import GrpcTransport
from groundglass_client.writers import report_text

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak_mb()
with open_study(Path(sys.argv[1])) as study, GrpcTransport(sys.argv[2]) as transport:
    report = analyse(study, transport, decode_hu).report
print(peak_mb() - before, file=sys.stderr)
print(report_text(report))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "study"), probe_server.grpc_address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    slices = json.loads(done.stdout)["slices"]
    assert len(slices) == 1000
    with open_study(tmp_path / "study") as study:
        checked = study.slices[::25]
        assert [slices[item.index]["lesion_pixels"] for item in checked] == [
            expected_pixels(decode_hu(item)) for item in checked
        ]
    assert float(done.stderr.splitlines()[-1]) < MEMORY_BOUND_MB


def test_a_server_killed_in_the_middle_that_returns_changes_nothing(probe_repository: Path) -> None:
    """kill -9 of the server during a study, and a restart at the same address: the verdict is that of a quiet run."""
    positives = [20 <= index < 50 for index in range(80)]
    how = SessionSettings(chunk_bytes=2 * SIDE * SIDE * 2, window=2, recovery_s=60.0)
    first = EmbeddedTriton(ServeSettings(repository=probe_repository))
    first.start()
    address = first.grpc_address
    restarted: list[EmbeddedTriton] = []
    killed = threading.Event()

    def restart() -> None:
        os.kill(first.pid, signal.SIGKILL)
        first.stop()
        again = EmbeddedTriton(replace(first.settings, grpc_port=int(address.rpartition(":")[2])))
        again.start()
        restarted.append(again)

    thread = threading.Thread(target=restart)
    answered = 0

    def on_slices(count: int) -> None:
        nonlocal answered
        answered += count
        if answered >= 30 and not killed.is_set():
            killed.set()
            thread.start()
            time.sleep(0.5)  # let it die before the next answers are taken

    try:
        with GrpcTransport(address) as transport:
            report = analyse(described_study(80), transport, Made(positives), how, on_slices).report
    finally:
        thread.join()
        first.stop()
        for server in restarted:
            server.stop()
    assert killed.is_set()
    assert [result.positive for result in report.slices] == positives
    assert (report.longest_run, report.scan_positive) == (30, True)


def test_a_server_killed_for_good_is_a_clear_error(probe_repository: Path) -> None:
    """kill -9 without a return ends the study with the address in the error, after the patience and not before."""
    how = SessionSettings(chunk_bytes=SIDE * SIDE * 2, window=2, recovery_s=2.0)
    with EmbeddedTriton(ServeSettings(repository=probe_repository)) as server:
        address = server.grpc_address

        def kill(count: int) -> None:
            if server.running:
                os.kill(server.pid, signal.SIGKILL)
                server.wait(5.0)

        with GrpcTransport(address) as transport, pytest.raises(ServerUnreachable, match=address):
            analyse(described_study(60), transport, Made([True] * 60), how, kill)


def test_a_server_without_our_models_is_refused_by_name(tmp_path: Path) -> None:
    """A server that doesn't serve ct_scan is refused at once, and the error names the model and the server."""
    repository = tmp_path / "empty"
    repository.mkdir()
    with (
        EmbeddedTriton(ServeSettings(repository=repository)) as server,
        GrpcTransport(server.grpc_address) as transport,
        pytest.raises(ServerRefused, match="ct_scan"),
    ):
        analyse(described_study(2), transport, Made([True] * 2))
