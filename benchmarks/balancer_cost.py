"""What the deployment's balancer costs: the same load straight to a server and through the balancer, in turns.

    python benchmarks/balancer_cost.py --server 127.0.0.2:8001 --balancer lb:8443 --tls-ca ca.pem --pid $(pidof haproxy)

The servers should be near-free ones (a probe network), or the network hides what lies in front of it. With ``--pid``,
on the balancer's own host, its CPU time is told as well, which a busy machine doesn't blur.
"""

from __future__ import annotations

import json
import secrets
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from groundglass.contract import IMAGE_SIDE
from groundglass.errors import GroundglassError, SettingError
from groundglass.publish import published
from groundglass.tls import TlsSettings
from groundglass_bench.host import describe_host
from groundglass_bench.rounds import HostClock, Rate, Rounds, measure
from groundglass_client.chunk import HU_BYTES, Chunk
from groundglass_client.connection import connect
from groundglass_client.requests import scan_request
from groundglass_client.settings import DEFAULT_SETTINGS
from groundglass_client.transport import Transport

NAME = "balancer"
DIRECT, BALANCED = "one server", "through the balancer"
TIMEOUT_S = 60.0
GIB = 1 << 30

app = typer.Typer(add_completion=False)


@app.command()
def balancer(
    server: Annotated[str, typer.Option(help="HOST:PORT of one server's plain gRPC.")],
    balancer: Annotated[str, typer.Option(help="HOST:PORT of the balancer.")],
    tls_ca: Annotated[Path, typer.Option(help="CA of the balancer's certificate, PEM.")],
    tls_cert: Annotated[Path | None, typer.Option(help="Client certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    pid: Annotated[int | None, typer.Option(help="The balancer's process on this host, for its CPU time.")] = None,
    slices: Annotated[int, typer.Option(min=8, help="512x512 slices of one run.")] = 400,
    repetitions: Annotated[int, typer.Option(help="Rounds; the median is reported.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/results"),
) -> None:
    """Measure, print, and write balancer.json."""
    rounds = Rounds(batches=(), repetitions=repetitions, min_seconds=0.0)
    process = None if pid is None else _process(pid)
    with ExitStack() as opened:
        tls = TlsSettings(tls_ca, tls_cert, tls_key)
        works: dict[str, Callable[[], object]] = {
            DIRECT: study(opened.enter_context(connect(server, shared_memory=False)), slices),
            BALANCED: study(opened.enter_context(connect(balancer, tls=tls)), slices),
        }
        before_s = _cpu_seconds(process)
        rates = measure(works, slices, rounds, HostClock())
        spent_s = _cpu_seconds(process) - before_s
    sent_bytes = (repetitions + 2) * slices * IMAGE_SIDE * IMAGE_SIDE * HU_BYTES  # two runs are the warm-up
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "host": describe_host(threads=1, on_gpu=False),
        "slices_per_s": {name: asdict(rate) for name, rate in rates.items()},
        "ratio": rates[BALANCED].median / rates[DIRECT].median,
        "balancer_cpu_s_per_gib": None if process is None else spent_s / sent_bytes * GIB,
    }
    out.mkdir(parents=True, exist_ok=True)
    with published(out / f"{NAME}.json") as beside:
        beside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _tell(rates, result["balancer_cpu_s_per_gib"])


def study(transport: Transport, slices: int) -> Callable[[], None]:
    """A run: chunks of empty slices, as many in flight as a study has; their masks are not asked for."""
    rows = DEFAULT_SETTINGS.chunk_bytes_of(shared=False) // (IMAGE_SIDE * IMAGE_SIDE * HU_BYTES)
    hu = np.full((rows, IMAGE_SIDE, IMAGE_SIDE), -1000, np.int16)

    def run() -> None:
        key, waiting = secrets.token_hex(16), []
        for start in range(0, slices, rows):
            end = min(start + rows, slices)
            chunk = Chunk(np.arange(start, end, dtype=np.int32), hu[: end - start])
            if len(waiting) == DEFAULT_SETTINGS.window:
                waiting.pop(0).result()
            waiting.append(transport.send(scan_request(chunk, key, slices, masks=False), TIMEOUT_S))
        for future in waiting:
            future.result()

    return run


def _tell(rates: dict[str, Rate], cpu_s_per_gib: float | None) -> None:
    for name, rate in rates.items():
        typer.echo(f"{name}: {rate.median:,.0f} slices/s ({rate.smallest:,.0f} to {rate.largest:,.0f})")
    typer.echo(f"ratio: {rates[BALANCED].median / rates[DIRECT].median:.2f}")
    if cpu_s_per_gib is not None:
        typer.echo(f"the balancer's CPU time: {cpu_s_per_gib:.2f} s a GiB")


def _process(pid: int) -> psutil.Process:
    try:
        return psutil.Process(pid)
    except psutil.Error as error:
        raise SettingError(f"--pid {pid}: no such process here") from error


def _cpu_seconds(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Run, and tell what Groundglass raises on purpose in one line."""
    try:
        app(standalone_mode=True)
    except GroundglassError as error:
        sys.exit(f"balancer_cost.py: {error}")


if __name__ == "__main__":
    main()
