"""HAProxy and Prometheus as Debian builds them: on PATH, or where ``make`` unpacked them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

UNPACKED = Path(sys.prefix) / "debian"
_PROGRAM_FOLDERS = ("usr/sbin", "usr/bin")


def program(name: str) -> str:
    """Path of ``haproxy``, ``prometheus`` or ``promtool``. Without it a test is skipped, but fails where CI is set."""
    folders = [str(UNPACKED / folder) for folder in _PROGRAM_FOLDERS]
    found = shutil.which(name, path=os.pathsep.join([*folders, os.environ["PATH"], "/usr/sbin"]))
    if found is None:
        message = f"no {name}: install Debian's package, or run make test on a Debian machine"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def environment() -> dict[str, str]:
    """The environment for such a program: libraries that were unpacked beside it are found."""
    libraries = [str(folder) for folder in (UNPACKED / "usr" / "lib").glob("*-linux-gnu")]
    known = os.environ.get("LD_LIBRARY_PATH")
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *([known] if known else [])])}
