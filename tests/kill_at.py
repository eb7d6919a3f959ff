"""A command of the swap tool that is killed (SIGKILL) at a step of its own, as a process of its own.

Usage: python kill_at.py REPOSITORY ADDRESS STEP COMMAND VERSION [FILE]. STEP counts from 0; ADDRESS - is no server. It
ends with exit code 0 when it comes to its end before that step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from groundglass_ensemble.versions import (
    Desk,
    Journal,
    ServerControl,
    VersionFolder,
    Watch,
    promote,
    retire,
    rollback,
    stage,
    verify,
)


def main(repository: str, address: str, fatal: str, command: str, version: str, file: str = "") -> None:
    """Run ``command`` and die at step ``fatal``."""
    taken: list[str] = []

    def on_step(step: str) -> None:
        if len(taken) == int(fatal):
            print(f"killed at: {step}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        taken.append(step)

    with ExitStack() as stack:
        controls = [] if address == "-" else [stack.enter_context(ServerControl(address))]
        desk = Desk(VersionFolder(Path(repository)), Journal(Path(repository), "killed"), controls, on_step)
        commands: dict[str, Callable[[], object]] = {
            "stage": lambda: stage(desk, [Path(file)], version=int(version)),
            "verify": lambda: verify(desk, int(version), lambda candidate: []),
            "promote": lambda: promote(desk, int(version), Watch(seconds=0.0)),
            "rollback": lambda: rollback(desk, int(version)),
            "retire": lambda: retire(desk, int(version), drain_s=0.0),
            "delete": lambda: retire(desk, int(version), delete=True, drain_s=0.0),
        }
        commands[command]()


if __name__ == "__main__":
    main(*sys.argv[1:])
