"""`groundglass serve`, and the server that other commands call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer

from groundglass.errors import ServeFailed, SettingError

DEFAULT_REPOSITORY: Final = Path("model_repository")
EMBEDDED_CONFIG: Final = "cpu"

Repository = Annotated[
    Path,
    typer.Option(envvar="GROUNDGLASS_REPOSITORY", help="Triton model repository for the embedded server."),
]
Port = typer.Option(min=0, max=65535, help="0 takes a free port.")


def serve(
    repository: Repository = DEFAULT_REPOSITORY,
    host: Annotated[str, typer.Option(help="Address to listen on; by default this machine only.")] = "127.0.0.1",
    grpc_port: Annotated[int, Port] = 8001,
    http_port: Annotated[int, Port] = 8000,
    metrics_port: Annotated[int, Port] = 8002,
    log_file: Annotated[Path | None, typer.Option(help="The server's log; a temporary file by default.")] = None,
    control: Annotated[
        str, typer.Option(help="explicit: versions can be swapped while it serves (groundglass models); or none.")
    ] = "none",
) -> None:
    """Serve the model repository with the Triton server of the nvidia-pytriton wheel, until interrupted."""
    from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
    from groundglass_ensemble.repository import check_repository

    if control not in ("none", "explicit"):
        raise SettingError(f"--control {control}: expected none or explicit")
    check_repository(repository, EMBEDDED_CONFIG)
    settings = ServeSettings(
        repository=repository,
        config_name=EMBEDDED_CONFIG,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        log_file=log_file,
        control="explicit" if control == "explicit" else "none",
    )
    with EmbeddedTriton(settings) as triton:
        print(f"ready: gRPC {triton.grpc_address}, HTTP {triton.http_address}, metrics {triton.metrics_address}")
        print(f"log: {triton.log_file}", flush=True)
        triton.wait()
        raise ServeFailed(f"the Triton server ended by itself: {triton.failure()}")


@contextmanager
def address(server: str | None, repository: Path) -> Iterator[str]:
    """The gRPC address to call: the given one, or that of an embedded server that lives as long as the block."""
    if server is not None:
        yield server
        return
    from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
    from groundglass_ensemble.repository import check_repository

    check_repository(repository, EMBEDDED_CONFIG)
    with EmbeddedTriton(ServeSettings(repository=repository, config_name=EMBEDDED_CONFIG)) as triton:
        yield triton.grpc_address
