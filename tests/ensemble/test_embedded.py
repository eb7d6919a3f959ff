"""The embedded server starts, says why it does not, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import tritonclient.grpc as triton

from calls import infer, scan_rows
from groundglass.contract import CT_SCAN, SLICE_POSITIVE
from groundglass.errors import ServeFailed, SettingError
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from groundglass_ensemble.keeper import SHARED_MEMORY

pytestmark = pytest.mark.triton

Change = Callable[[Path], object]


def regions(prefix: str) -> list[Path]:
    """Shared memory of one server."""
    return list(SHARED_MEMORY.glob(f"{prefix}*"))


def group(leader: int) -> list[int]:
    """Living processes of a process group: a server and its stages."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except (psutil.Error, ProcessLookupError):
            continue
    return members


def await_gone(leader: int, prefix: str) -> None:
    """Fail unless the server's processes and shared memory vanish within ten seconds."""
    deadline = time.monotonic() + 10
    while (group(leader) or regions(prefix)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert group(leader) == []
    assert regions(prefix) == []


def replaced(file: str, old: str, new: str) -> Change:
    """A change of a repository's text file."""
    return lambda root: (root / file).write_text((root / file).read_text().replace(old, new))


def test_stop_leaves_nothing(probe_repository: Path, tmp_path: Path) -> None:
    """Leaving the block ends server and stages, frees the ports, removes the shared memory, and keeps the log."""
    log = tmp_path / "logs" / "triton.log"
    with EmbeddedTriton(ServeSettings(probe_repository, log_file=log)) as server:
        leader, prefix, port = server.pid, server.shm_prefix, int(server.grpc_address.rpartition(":")[2])
        assert len(group(leader)) == 4
        assert regions(prefix)
    assert not server.running
    assert (group(leader), regions(prefix)) == ([], [])
    assert "Started GRPCInferenceService" in log.read_text()
    with EmbeddedTriton(ServeSettings(probe_repository, grpc_port=port, log_file=log)) as again:
        assert again.grpc_address == f"127.0.0.1:{port}"


def test_a_killed_server_is_noticed_and_cleaned_up(probe_repository: Path) -> None:
    """After kill -9 of the server nothing of it is left, ``wait`` returns, and leaving the block works as ever."""
    with EmbeddedTriton(ServeSettings(probe_repository)) as server:
        leader, prefix = server.pid, server.shm_prefix
        os.kill(leader, signal.SIGKILL)
        assert server.wait(10) == 128 + signal.SIGKILL
        await_gone(leader, prefix)
        assert not server.running


def test_an_exception_in_the_block_stops_the_server(probe_repository: Path) -> None:
    """The caller's own error passes through, and the server is gone."""

    def interrupted() -> None:
        with EmbeddedTriton(ServeSettings(probe_repository)) as server:
            started.append((server.pid, server.shm_prefix))
            raise KeyboardInterrupt

    started: list[tuple[int, str]] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    leader, prefix = started[0]
    assert (group(leader), regions(prefix)) == ([], [])


STARTER = """
import signal, sys
from pathlib import Path
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
with EmbeddedTriton(ServeSettings(Path(sys.argv[1]))) as server:
    print(server.pid, server.shm_prefix, flush=True)
    server.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_with_its_starter(probe_repository: Path, number: signal.Signals) -> None:
    """However the starter is ended, even by kill -9, the server follows and leaves nothing."""
    command = [sys.executable, "-c", STARTER, str(probe_repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as starter:
        assert starter.stdout is not None
        leader, prefix = starter.stdout.readline().split()
        starter.send_signal(number)
        starter.wait(20)
    await_gone(int(leader), prefix)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "unet/1/model.onnx").unlink(), "model 'unet' version 1 has no file .*model.onnx"),
        (lambda root: (root / "unet/1/model.onnx").write_bytes(b"no graph"), "model.onnx can't be loaded"),
        (lambda root: (root / "unet/configs/cpu.pbtxt").write_text("name: {"), "read text proto from .*cpu.pbtxt"),
        (replaced("unet/configs/cpu.pbtxt", '"MASK"', '"MASKS"'), "output 'MASKS' is not in the model"),
        (replaced("unet/configs/cpu.pbtxt", "TYPE_UINT8", "TYPE_INT8"), "'MASK' is TYPE_INT8 in the configuration"),
        (replaced("unet/configs/cpu.pbtxt", "onnxruntime", "tensorrt"), "TensorRT plan, and this server lacks"),
        (replaced("scan_aggregator/config.pbtxt", '"15"', '"none"'), "positive_run_slices is 'none'"),
        (lambda root: (root / "scan_aggregator/1/model.py").write_text("import no_such"), "No module named 'no_such'"),
    ],
    ids=["no file", "corrupted", "bad pbtxt", "output", "type", "plan", "parameter", "import"],
)
def test_a_failed_start_tells_the_reason(probe_repository: Path, tmp_path: Path, change: Change, words: str) -> None:
    """A repository that can't be served raises at once, with the cause in one line and no traceback."""
    root = Path(shutil.copytree(probe_repository, tmp_path / "repository"))
    change(root)
    server = EmbeddedTriton(ServeSettings(root))
    with pytest.raises(ServeFailed, match=words) as failure:
        server.start()
    assert "\n" not in str(failure.value)
    assert "At:" not in str(failure.value)
    assert not server.running


def test_a_port_in_use_is_named(probe_repository: Path) -> None:
    """A given port that another process holds is an error before anything starts."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeFailed, match=f"port {port} on 127.0.0.1 .*in use"):
            EmbeddedTriton(ServeSettings(probe_repository, grpc_port=port)).start()


def test_unusable_settings_are_refused(probe_repository: Path, tmp_path: Path) -> None:
    """A port out of range, a flag that Triton does not know and a repository that is none are errors that say so."""
    with pytest.raises(SettingError, match="port 70000"):
        EmbeddedTriton(ServeSettings(probe_repository, http_port=70000)).start()
    with pytest.raises(ServeFailed, match="--nonsense"):
        EmbeddedTriton(ServeSettings(probe_repository, arguments=("--nonsense",))).start()
    with pytest.raises(ServeFailed, match="not a folder"):
        EmbeddedTriton(ServeSettings(tmp_path / "none")).start()


def test_a_new_version_loads_over_grpc(probe_repository: Path, tmp_path: Path) -> None:
    """Under explicit control a second version of the network takes over, and a bad third one leaves it serving."""
    root = Path(shutil.copytree(probe_repository, tmp_path / "repository"))
    with EmbeddedTriton(ServeSettings(root, control="explicit")) as server:
        shutil.copytree(root / "unet" / "1", root / "unet" / "2")
        with triton.InferenceServerClient(server.grpc_address) as client:
            client.load_model("unet")
            assert client.is_model_ready("unet", "2")
            assert not client.is_model_ready("unet", "1")
            (root / "unet" / "3").mkdir()
            with pytest.raises(triton.InferenceServerException, match="has no file"):
                client.load_model("unet")
        answer = infer(server.grpc_address, CT_SCAN.name, scan_rows(b"after", [0], [True]))
        assert answer[SLICE_POSITIVE.name].all()
