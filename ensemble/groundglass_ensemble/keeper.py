"""The keeper of a Triton server: a small process between the server and whoever started it, which tidies up after both.

However the starter ends (in order, by an exception, by ``kill -9``), the pipe at the keeper's standard input closes,
and the keeper stops the server. However the server ends, the keeper kills the processes that it left, and removes its
shared memory.
PR_SET_PDEATHSIG on the server alone would not do: it fires when the *thread* that started the server ends,
leaves the shared memory, and does not reach the processes of the Python stages.

Run as a file, with the standard library only: ``python -I keeper.py SHM_PREFIX GRACE_S LOG_FILE PROGRAM ARGUMENT...``.
It writes the server's process id to its standard output, and exits as the server did.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory, not a temporary file
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
_LOST_KEEPER_SIGNAL = signal.SIGKILL


def remove_shared_memory(prefix: str) -> None:
    """Delete the regions whose names start with ``prefix``, which is one server's own."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def kill_group(process_id: int) -> None:
    """Kill what is left of the process group that ``process_id`` led."""
    with suppress(ProcessLookupError):
        os.killpg(process_id, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """Keep one server until it ends, or until the starter does. Returns the server's exit code."""
    shm_prefix, grace_s, log_file, *command = arguments
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the pipe alone says when to stop
    with Path(log_file).open("ab") as log:
        server = subprocess.Popen(  # noqa: S603 - the command is the embedding process's own
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),
        )
    print(server.pid, flush=True)
    starter = os.getppid()
    try:
        while server.poll() is None and _wanted(starter):
            pass
        _terminate(server, float(grace_s))
    finally:
        kill_group(server.pid)
        remove_shared_memory(shm_prefix)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def _die_with(keeper: int) -> Callable[[], None]:
    """For the case that the keeper itself is killed. It has one thread only, so here the death signal is exact."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        libc.prctl(_PR_SET_PDEATHSIG, _LOST_KEEPER_SIGNAL)
        if os.getppid() != keeper:
            os._exit(1)

    return prepare


def _wanted(starter: int) -> bool:
    """Whether the starter still lives and holds the pipe; waits a moment for news.

    Its process id is watched as well: a child that the starter forked may hold the pipe open for longer than it lives.
    """
    readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
    return not readable and os.getppid() == starter


def _terminate(server: subprocess.Popen[bytes], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    if server.poll() is None:
        server.terminate()
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S / 5)
    if server.poll() is None:
        server.kill()
    server.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
