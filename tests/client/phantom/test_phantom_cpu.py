"""A phantom is the same on every CPU: golden answers are recorded of it on one, and asked for on another."""

from __future__ import annotations

import os
import subprocess
import sys

VECTORS = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX2 FMA3"
SCRIPT = """
import hashlib, warnings
from groundglass_client.phantom import PhantomSettings
from groundglass_client.phantom.chest import Chest
chest = Chest(PhantomSettings(slices=24, lesion=(4, 20)))
print(hashlib.sha256(b"".join(chest.hu(index).tobytes() for index in range(0, 24, 3))).hexdigest())
"""


def digest(**environment: str) -> str:
    """SHA-256 of some slices, as a process with this environment makes them."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_vector_instructions_change_no_pixel() -> None:
    """Without the vector instructions that this CPU has, every Hounsfield unit is as with them."""
    assert digest(NPY_DISABLE_CPU_FEATURES=VECTORS) == digest()
