"""A client in a process of its own, so that its memory can be told: sends one study, writes seconds and bytes as JSON.

Run as ``python -m groundglass_bench.client_process SERVER SLICES [masks]``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from groundglass.errors import GroundglassError
from groundglass_bench.memory import own_bytes, own_peak_bytes

_WARM_UP_SLICES = 32
_LONGEST_S = 1800.0


@dataclass(frozen=True, slots=True)
class ClientRun:
    """One study: its wall time, and the client's memory before it and at its most."""

    seconds: float
    start_bytes: int
    peak_bytes: int

    @property
    def growth_bytes(self) -> int:
        """What the study cost."""
        return self.peak_bytes - self.start_bytes


def run_client(server: str, slices: int, *, masks: bool = False) -> ClientRun:
    """Send a study of ``slices`` from a new process. Raises GroundglassError with the reason when it fails."""
    command = [sys.executable, "-m", __name__, server, str(slices), *(["masks"] if masks else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S, check=False)  # noqa: S603
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise GroundglassError(f"the client process failed: {lines[-1]}")
    return ClientRun(**json.loads(done.stdout))


def main(server: str, slices: int, *, masks: bool) -> ClientRun:
    """What happens in the process."""
    from groundglass_bench.sending import send_study
    from groundglass_bench.studies import memory_study
    from groundglass_client.connection import connect

    study, decode = memory_study(slices)
    small, decode_small = memory_study(_WARM_UP_SLICES)
    start_bytes = own_bytes()
    with connect(server) as transport:
        send_study(small, transport, decode_small, masks=masks)
        sent = send_study(study, transport, decode, masks=masks)
    return ClientRun(sent.seconds, start_bytes, own_peak_bytes())


if __name__ == "__main__":
    print(json.dumps(asdict(main(sys.argv[1], int(sys.argv[2]), masks="masks" in sys.argv[3:]))))
