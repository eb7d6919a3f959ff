"""The script that starts the server in its container, run on the embedded server's binary."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from groundglass_ensemble.keeper import remove_shared_memory
from groundglass_ensemble.probe import is_ready
from groundglass_ensemble.wheel import assemble_backends, find_wheel, server_environment

SCRIPT = Path(__file__).parents[2] / "deploy" / "serve.sh"
SHM_PREFIX = f"groundglass_serve_sh_{os.getpid()}_"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def test_a_missing_repository_is_named(tmp_path: Path) -> None:
    """Without a model repository nothing is started, and the folder is told."""
    environment = {**os.environ, "MODEL_REPOSITORY": str(tmp_path / "none")}
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert str(tmp_path / "none") in done.stderr


def test_newer_servers_are_told_to_allow_shared_memory(tmp_path: Path) -> None:
    """A server that lists the flag gets it, one that does not is started without it; options are handed on."""
    for known in (True, False):
        text = "--allow-client-shm <boolean>" if known else "--model-repository <string>"
        server = tmp_path / "tritonserver"
        server.write_text(f'#!/bin/sh\nif [ "$1" = --help ]; then echo "{text}"; else echo "$@"; fi\n')
        server.chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "MODEL_REPOSITORY": str(tmp_path), "PATH": path}
        done = subprocess.run([str(SCRIPT), "--log-verbose=1"], capture_output=True, text=True, env=environment)
        flag = "--allow-client-shm=true " if known else ""
        assert done.stdout == f"--model-repository={tmp_path} {flag}--log-verbose=1\n"


@pytest.mark.triton
def test_it_serves_with_the_real_server(probe_repository: Path, tmp_path: Path) -> None:
    """The embedded server, which does not know the flag, serves the repository when it is started by the script."""
    wheel = find_wheel()
    environment = server_environment(wheel)
    environment["PATH"] = f"{wheel.server.parent}{os.pathsep}{environment['PATH']}"
    environment["MODEL_REPOSITORY"] = str(probe_repository)
    port = free_port()
    command = [
        *(str(SCRIPT), "--model-config-name=cpu", f"--backend-directory={assemble_backends(wheel, tmp_path / 'b')}"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={port}", "--allow-http=false", "--allow-metrics=false"),
        f"--backend-config=python,shm-region-prefix-name={SHM_PREFIX}",
    ]
    log = (tmp_path / "log").open("wb")
    with log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        try:
            deadline = time.monotonic() + 60
            while not is_ready(f"127.0.0.1:{port}", 5.0) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert is_ready(f"127.0.0.1:{port}", 5.0), (tmp_path / "log").read_text()
        finally:
            server.terminate()
            server.wait(30)
            remove_shared_memory(SHM_PREFIX)
