"""The command line: parse, call the library, choose the exit code.

The composition root: the only part of core that knows the other packages, and it imports them when they are needed.

Results go to stdout, progress and logs to stderr. Exit code 0: the work was done, whatever the verdict; 1: it could
not be done, with one line that says why; 2: wrong usage; 130: interrupted.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from importlib.metadata import version
from typing import Annotated, Final, NoReturn

import typer

from groundglass.cli.benching import bench
from groundglass.cli.evaluating import evaluate, pool
from groundglass.cli.exporting import export_app
from groundglass.cli.models import models_app
from groundglass.cli.planning import capacity
from groundglass.cli.serving import serve
from groundglass.cli.studies import analyze, phantom
from groundglass.cli.training import train
from groundglass.errors import GroundglassError

INTERRUPTED: Final = 130

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog="Example: groundglass analyze study/ --out result/")(analyze)
app.command(epilog="Example: groundglass serve --grpc-port 8001")(serve)
app.command(epilog="Example: groundglass phantom --slices 60 --lesion 20:40 --out phantom/")(phantom)
app.add_typer(export_app, name="export")
app.add_typer(models_app, name="models")
app.command(
    epilog="Example: groundglass train --recipe export/recipes/reference.toml --data data/ --minutes 90 --out runs/1"
)(train)
app.command(
    epilog="Example: groundglass evaluate --set export/evaluation/reference.toml --data data/ --server localhost:8001"
)(evaluate)
app.command(epilog="Example: groundglass pool fold_a.json fold_b.json")(pool)
app.command(epilog="Example: groundglass bench --server localhost:8001 --out bench/")(bench)
app.command(epilog="Example: groundglass capacity --studies-per-hour 60 --slices-per-s 500")(capacity)


def main() -> None:
    """Run the command line and exit."""
    # gRPC writes its own account of every failed handshake to stderr, beside our line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    signal.signal(signal.SIGTERM, _interrupt)  # a plain kill cleans up servers and temporary files, as Ctrl-C does
    try:
        app(prog_name="groundglass")
    except GroundglassError as error:
        print(f"groundglass: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("groundglass: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, on stderr.")] = False,
) -> None:
    """Groundglass: a chest CT in, lesion masks and a scan verdict out, through NVIDIA Triton. Not for diagnosis."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    if show_version:
        print(version("groundglass"))
        raise typer.Exit


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
