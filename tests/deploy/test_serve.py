"""The script that starts the server in its container: what it hands on, and refuses. test_compose_servers.py serves."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "serve.sh"


def run(tmp_path: Path, *options: str, known: str = "--model-repository", **settings: str) -> tuple[int, str, str]:
    """The script with a server that lists the flag ``known``, and prints its allocator and what it was started with."""
    server = tmp_path / "tritonserver"
    server.write_text(f'#!/bin/sh\n[ "$1" = --help ] && echo " {known} <x>" || echo "${{LD_PRELOAD:-none}}" "$@"\n')
    server.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "MODEL_REPOSITORY": str(tmp_path), "PATH": path, **settings}
    done = subprocess.run([str(SCRIPT), *options], capture_output=True, text=True, env=environment, timeout=30)
    return done.returncode, done.stdout, done.stderr


def key_file(tmp_path: Path, text: str) -> str:
    """A file with a control key."""
    (tmp_path / "key").write_text(text)
    return str(tmp_path / "key")


@pytest.mark.parametrize("allowed", ["true", "false"])
def test_newer_servers_are_told_about_shared_memory(tmp_path: Path, allowed: str) -> None:
    """A server that lists the flag gets it as set, one that does not is started without it; options are handed on."""
    for known, flag in (("--allow-client-shm", f"--allow-client-shm={allowed} "), ("--model-repository", "")):
        _, started, _ = run(tmp_path, "--log-verbose=1", known=known, ALLOW_CLIENT_SHM=allowed)
        assert started == f"none --model-repository={tmp_path} {flag}--log-verbose=1\n"


def test_shared_memory_is_off_by_default(tmp_path: Path) -> None:
    """Who registers regions is trusted by the server: nobody is unless that is set."""
    assert "--allow-client-shm=false" in run(tmp_path, known="--allow-client-shm")[1]


def test_the_key_guards_what_changes_a_server(tmp_path: Path) -> None:
    """With a key, control over gRPC and HTTP asks for it, shared memory too unless it is allowed."""
    settings = {"CONTROL_KEY_FILE": key_file(tmp_path, "0123456789abcdef\n")}
    for allowed, more in (("false", ",shared-memory"), ("true", "")):
        _, started, _ = run(tmp_path, "--model-control-mode=explicit", ALLOW_CLIENT_SHM=allowed, **settings)
        for option in ("--grpc-restricted-protocol", "--http-restricted-api"):
            assert f"{option}=model-repository,trace,logging{more}:groundglass-key=0123456789abcdef " in started


def test_a_collector_gets_what_clients_trace(tmp_path: Path) -> None:
    """With a collector the server traces the requests whose clients ask for it; without one it traces nothing."""
    _, started, _ = run(tmp_path, TRACE_TO="http://collector:4318/v1/traces")
    settings = ("mode=opentelemetry", "opentelemetry,url=http://collector:4318/v1/traces", "level=TIMESTAMPS", "rate=0")
    assert all(f"--trace-config={setting}" in started.split() for setting in settings)
    assert "trace" not in run(tmp_path, TRACE_TO="none")[1] + run(tmp_path)[1]


def test_an_allocator_is_for_the_server(tmp_path: Path) -> None:
    """The library that MALLOC_LIBRARY names is loaded into the server."""
    library = next(
        part for part in Path("/proc/self/maps").read_text().split() if part.startswith("/") and "libc" in part
    )
    assert run(tmp_path, MALLOC_LIBRARY=library)[1] == f"{library} --model-repository={tmp_path}\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MODEL_REPOSITORY": "/none"}, "/none is no folder"),
        ({"ALLOW_CLIENT_SHM": "yes"}, "ALLOW_CLIENT_SHM is yes: expected true or false"),
        ({"TRACE_TO": "collector:4318"}, "TRACE_TO is collector:4318: expected none, or a collector's endpoint"),
        ({"MALLOC_LIBRARY": "/none.so"}, "MALLOC_LIBRARY: no library at /none.so"),
        ({"CONTROL_KEY_FILE": "/none.key"}, "CONTROL_KEY_FILE: /none.key can't be read"),
        ({"CONTROL_KEY_FILE": ""}, "explicit model control needs a key: name its file in CONTROL_KEY_FILE"),
        ({"key": ""}, "holds 0 characters: expected a key of 16 or more"),
        ({"key": "0123456789abcde"}, "holds 15 characters"),
        ({"key": "0123456789 abcdef"}, "expected letters, digits, - and _ in one line"),
        ({"key": "0123456789abcdef\n0123456789abcdef\n"}, "expected letters, digits, - and _ in one line"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    """A setting that can't work ends the start with one line that names it; the server is not started."""
    if "key" in settings:
        settings = {"CONTROL_KEY_FILE": key_file(tmp_path, settings["key"])}
    code, started, said = run(tmp_path, "--model-control-mode=explicit", **settings)
    assert (code, started) == (1, "")
    (line,) = said.splitlines()
    assert message in line
