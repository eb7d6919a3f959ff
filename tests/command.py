"""The command line, run as its users run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def groundglass(
    *arguments: str | Path, timeout_s: float = 120, largest_file_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end. A file that grows beyond ``largest_file_bytes`` fails, as on a full disk."""
    command = [sys.executable, "-m", "groundglass", *map(str, arguments)]
    limit = [] if largest_file_bytes is None else ["prlimit", f"--fsize={largest_file_bytes}"]
    return subprocess.run([*limit, *command], capture_output=True, text=True, timeout=timeout_s, check=False)


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 1, nothing on stdout, and one line on stderr that holds the words."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("groundglass: ")
    for word in words:
        assert word in line
