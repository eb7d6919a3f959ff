"""A server on the same host reads slices from shared memory: right verdicts, and nothing left, whatever happens."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

import probe_network
from client_study import study_of
from groundglass.study import SliceSource, Study
from groundglass_client import buffers as buffers_module
from groundglass_client.buffers import PREFIX, SHARED_MEMORY, Buffer, Buffers
from groundglass_client.connection import connect
from groundglass_client.phantom import PhantomSettings, write_phantom
from groundglass_client.session import SessionSettings, analyse
from groundglass_client.transport import GrpcTransport
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from own_memory import regions

pytestmark = pytest.mark.triton

SIDE = 128
SMALL = SessionSettings(chunk_bytes=4 * SIDE * SIDE * 2, window=3)


def decode(source: SliceSource) -> np.ndarray:
    """Slices that differ, most of them not by so much that they become positive."""
    hu = probe_network.slices([source.index % 2 == 0 or 20 <= source.index < 40], SIDE)[0]
    hu[0, : source.index % 4] = probe_network.LESION_HU + 1  # up to 48 pixels of the image: not enough
    return hu


def registered(address: str) -> list[str]:
    """Names of the regions that the server knows."""
    with triton.InferenceServerClient(address) as client:
        return [name for name in client.get_system_shared_memory_status().regions if name.startswith(PREFIX)]


@pytest.fixture
def study() -> Study:
    """Sixty small slices."""
    return study_of(60, SIDE)


@pytest.fixture
def server(probe_repository: Path) -> Iterator[EmbeddedTriton]:
    """A server of one's own, which may be killed."""
    with EmbeddedTriton(ServeSettings(probe_repository)) as started:
        yield started


@pytest.mark.parametrize("masks", [True, False])
def test_shared_memory_and_bytes_give_the_same(probe_server: EmbeddedTriton, study: Study, masks: bool) -> None:
    """Every lesion pixel, verdict and mask is the same both ways; regions are known meanwhile and gone afterwards."""
    address, known, found = probe_server.grpc_address, [], []
    before = regions(PREFIX)
    for shared in (True, False):
        with connect(address, shared_memory=shared) as transport:
            analysis = analyse(
                study,
                transport,
                decode,
                replace(SMALL, masks=masks),
                lambda count: known.append(len(registered(address))),
            )
        found.append(analysis)
        assert registered(address) == []
        assert regions(PREFIX) <= before
    first, second = found
    assert max(known[: len(known) // 2]) > 0
    assert known[len(known) // 2 :] == [0] * (len(known) // 2)
    assert [item.lesion_pixels for item in first.report.slices] == [item.lesion_pixels for item in second.report.slices]
    assert (first.report.longest_run, second.report.longest_run) == (21, 21)
    if masks:
        np.testing.assert_array_equal(first.masks, second.masks)
    else:
        assert first.masks is None


def test_a_server_that_cannot_see_it_gets_bytes(
    probe_server: EmbeddedTriton, study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that can't open a region, as one in another container can't, is sent bytes, and the log says so once."""

    class Elsewhere(Buffers):
        def take(self, size: int) -> Buffer:
            buffer = super().take(size)
            if buffer.region is not None:
                (SHARED_MEMORY / buffer.region.name).unlink(missing_ok=True)
            return buffer

    pool = Elsewhere(shared=True)
    with GrpcTransport(probe_server.grpc_address, pool) as transport:
        report = analyse(study, transport, decode, SMALL).report
        pool.close()
    assert report.longest_run == 21
    assert caplog.text.count("does not read this process's shared memory") == 1
    assert "--allow-client-shm" in caplog.text


def test_a_restarted_server_registers_anew(server: EmbeddedTriton, probe_repository: Path, study: Study) -> None:
    """kill -9 and a restart in the middle of a study: the same verdict, and the new server reads shared memory too."""
    again: list[EmbeddedTriton] = []
    answered: list[int] = []
    address = server.grpc_address
    known_after: list[int] = []

    def restart() -> None:
        os.kill(server.pid, signal.SIGKILL)
        server.stop()
        again.append(EmbeddedTriton(replace(server.settings, grpc_port=int(address.rpartition(":")[2]))))
        again[0].start()

    def on_slices(count: int) -> None:
        answered.append(count)
        if sum(answered) == 20:
            restart()
        elif again:
            known_after.append(len(registered(address)))

    before = regions(PREFIX)
    try:
        with connect(address) as transport:
            report = analyse(study, transport, decode, SMALL, on_slices).report
        assert registered(address) == []
    finally:
        for restarted in again:
            restarted.stop()
    assert report.longest_run == 21
    assert max(known_after) > 0
    assert regions(PREFIX) <= before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
def test_an_interrupted_client_leaves_nothing(
    probe_server: EmbeddedTriton, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C and a plain kill in the middle of a study take back every region, here and at the server."""
    write_phantom(PhantomSettings(slices=4), tmp_path / "study")
    before = regions(PREFIX)
    program = f"""
import sys
from pathlib import Path
from dataclasses import replace
from groundglass import cli
from groundglass_client import session
whole = session.analyse
def endless(study, transport, decode_hu, settings, on_slices):
    print("running", flush=True)
    slices = tuple(replace(study.slices[index % 4], index=index) for index in range(20_000))
    return whole(replace(study, slices=slices), transport, decode_hu, settings, lambda count: None)
session.analyse = endless
sys.argv = ["groundglass", "analyze", {str(tmp_path / "study")!r}, "--server", {probe_server.grpc_address!r}]
cli.main()
"""
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    ) as client:
        assert client.stdout is not None
        client.stdout.readline()
        deadline = time.monotonic() + 30
        while not registered(probe_server.grpc_address) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert registered(probe_server.grpc_address)
        client.send_signal(number)
        _, errors = client.communicate(timeout=60)
    assert client.returncode == 130
    assert "Traceback" not in errors
    assert registered(probe_server.grpc_address) == []
    assert regions(PREFIX) <= before


def test_the_next_client_tidies_up_after_a_killed_one(
    server: EmbeddedTriton, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After kill -9 of a client its regions stay known to the server, until another client comes."""
    program = f"""
import time
from groundglass_client.connection import connect
from groundglass_client.requests import Chunk, scan_request
import numpy as np
with connect({server.grpc_address!r}) as transport:
    buffer = transport.buffers().take(1 << 20)
    chunk = Chunk(np.arange(1, dtype=np.int32), buffer.hu(1, 16, 16))
    chunk.hu[:] = -1000
    transport.send(scan_request(chunk, "killed", 1, masks=True, buffer=buffer), 30.0).result()
    print("answered", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "answered\n"
        killed.kill()
    abandoned = registered(server.grpc_address)
    assert len(abandoned) == 1
    monkeypatch.setattr(buffers_module, "_ABANDONED_S", -1.0)
    with connect(server.grpc_address) as transport:
        analyse(study, transport, decode, SMALL)
    assert registered(server.grpc_address) == []
    assert not (SHARED_MEMORY / abandoned[0]).exists()


def test_two_servers_share_a_study_in_shared_memory(
    probe_server: EmbeddedTriton, server: EmbeddedTriton, study: Study
) -> None:
    """One study over two servers of this host, one of them killed on the way: all slices, the right verdict."""
    answered = 0

    def on_slices(count: int) -> None:
        nonlocal answered
        answered += count
        if answered == 20:
            threading.Thread(target=os.kill, args=(server.pid, signal.SIGKILL)).start()

    with connect(f"{server.grpc_address},{probe_server.grpc_address}") as transport:
        report = analyse(study, transport, decode, SMALL, on_slices).report
    assert (len(report.slices), report.longest_run) == (60, 21)
    assert registered(probe_server.grpc_address) == []
