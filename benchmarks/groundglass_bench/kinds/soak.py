"""A soak: long studies in a row, after which the server's memory is what it was."""

from __future__ import annotations

from groundglass_bench.figures import Figure
from groundglass_bench.memory import MB, group_bytes, own_bytes
from groundglass_bench.result import Chart, Line, Measured
from groundglass_bench.sending import send_study
from groundglass_bench.serving import Surroundings, near_free_server
from groundglass_bench.settings import Soak
from groundglass_bench.studies import memory_study
from groundglass_client.connection import connect


def measure_soak(load: Soak, around: Surroundings) -> Measured:
    """Memory after each study: of the server's processes together, and of this client."""
    study, decode = memory_study(load.slices)
    server_mb, client_mb, rates = [], [], []
    with near_free_server(around) as server, connect(server.grpc) as transport:
        for number in range(1, load.studies + 1):
            rates.append(load.slices / send_study(study, transport, decode).seconds)
            server_mb.append(group_bytes(server.pid) / MB)
            client_mb.append(own_bytes() / MB)
            around.tell(f"study {number}: {rates[-1]:.0f} slices/s, server {server_mb[-1]:.0f} MB")
    settled = load.settled - 1
    numbers = tuple(map(float, range(1, load.studies + 1)))
    return Measured(
        figures=(
            Figure("server_growth", "", (server_mb[-1] / server_mb[settled],)),
            Figure("client_growth", "MB", (client_mb[-1] - client_mb[settled],)),
            Figure("server_memory", "MB", tuple(server_mb)),
            Figure("rate", "slices/s", tuple(rates)),
        ),
        charts=(
            Chart(
                "Memory over the studies",
                "studies sent",
                "memory, MB",
                (Line("server", numbers, tuple(server_mb)), Line("client", numbers, tuple(client_mb))),
            ),
        ),
        notes=(
            f"Growth is from study {load.settled} to study {load.studies}, each of {load.slices} slices. The client "
            "is this process, which holds what the scenarios before it left.",
        ),
    )
