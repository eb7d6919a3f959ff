"""The command line: parse, call the library, choose the exit code.

The composition root: the only module of core that knows the other packages, and it imports them when they are needed.

Results go to stdout, progress and logs to stderr. Exit code 0: the work was done, whatever the verdict; 1: it could
not be done, with one line that says why; 2: wrong usage; 130: interrupted.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from groundglass.errors import GroundglassError, MissingExtra, ServeFailed

if TYPE_CHECKING:
    from groundglass.report import ScanReport
    from groundglass_client.session import ScanAnalysis

DEFAULT_REPOSITORY: Final = Path("model_repository")
EMBEDDED_CONFIG: Final = "cpu"
INTERRUPTED: Final = 130

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
export_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Turn a checkpoint into served models.")
app.add_typer(export_app, name="export")

Repository = Annotated[
    Path,
    typer.Option(envvar="GROUNDGLASS_REPOSITORY", help="Triton model repository for the embedded server."),
]
Port = typer.Option(min=0, max=65535, help="0 takes a free port.")


def main() -> None:
    """Run the command line and exit."""
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


@app.command(epilog="Example: groundglass analyze study/ --out result/")
def analyze(
    study: Annotated[
        Path, typer.Argument(help="CT study: folder, zip, DICOMDIR or file; or a folder of 8-bit PNG/JPG.")
    ],
    server: Annotated[
        str | None,
        typer.Option(help="Triton's gRPC endpoint, HOST:PORT. Default: an embedded server, stopped afterwards."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json, overview.png and masks.npz.")] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - for stdout.")
    ] = None,
    series: Annotated[str | None, typer.Option(help="SeriesInstanceUID or series number to analyse.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out unusable files and call the verdict partial.")
    ] = False,
    deadline_s: Annotated[float | None, typer.Option(min=0.0, help="Give up after this many seconds.")] = None,
    repository: Repository = DEFAULT_REPOSITORY,
) -> None:
    """Send a CT study through the server and print its verdict."""
    from groundglass_client.intake import decode_hu, open_study
    from groundglass_client.session import SessionSettings, analyse
    from groundglass_client.transport import GrpcTransport
    from groundglass_client.writers import report_text, write_report

    settings = SessionSettings(deadline_s=deadline_s, skip_bad=skip_bad, masks=out is not None)
    with open_study(study, skip_bad=skip_bad, series=series) as opened:
        with (
            _address(server, repository) as address,
            GrpcTransport(address) as transport,
            _progress("slices", len(opened.slices)) as advance,
        ):
            analysis = analyse(opened, transport, decode_hu, settings, advance)
        if out is not None:
            _write_results(analysis, out)
    if json_file == "-":
        print(report_text(analysis.report), end="")
        return
    if json_file is not None:
        write_report(analysis.report, Path(json_file))
    _print_summary(analysis.report, out)


@app.command(epilog="Example: groundglass serve --grpc-port 8001")
def serve(
    repository: Repository = DEFAULT_REPOSITORY,
    host: Annotated[str, typer.Option(help="Address to listen on; by default this machine only.")] = "127.0.0.1",
    grpc_port: Annotated[int, Port] = 8001,
    http_port: Annotated[int, Port] = 8000,
    metrics_port: Annotated[int, Port] = 8002,
    log_file: Annotated[Path | None, typer.Option(help="The server's log; a temporary file by default.")] = None,
) -> None:
    """Serve the model repository with the Triton server of the nvidia-pytriton wheel, until interrupted."""
    from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
    from groundglass_ensemble.repository import check_repository

    check_repository(repository, EMBEDDED_CONFIG)
    settings = ServeSettings(
        repository=repository,
        config_name=EMBEDDED_CONFIG,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        log_file=log_file,
    )
    with EmbeddedTriton(settings) as triton:
        print(f"ready: gRPC {triton.grpc_address}, HTTP {triton.http_address}, metrics {triton.metrics_address}")
        print(f"log: {triton.log_file}", flush=True)
        triton.wait()
        raise ServeFailed(f"the Triton server ended by itself: {triton.failure()}")


@app.command(epilog="Example: groundglass phantom --slices 60 --lesion 20:40 --out phantom/")
def phantom(
    out: Annotated[Path, typer.Option(help="Folder to write; absent or empty.")],
    slices: Annotated[int, typer.Option(min=1, help="Slices of the scan.")] = 60,
    lesion: Annotated[
        str, typer.Option(metavar="FIRST:END", help="Slices with ground-glass, counted from the head, END excluded.")
    ] = "none",
    syntax: Annotated[
        str,
        typer.Option(help="Transfer syntax: explicit, implicit, deflated, rle, jpeg-lossless, jpeg-ls or jpeg2000."),
    ] = "explicit",
    seed: Annotated[int, typer.Option(help="Same seed, same scan.")] = 0,
) -> None:
    """Write a synthetic chest CT as DICOM."""
    from groundglass_client.phantom import PhantomSettings, parse_lesion, write_phantom

    settings = PhantomSettings(slices=slices, lesion=parse_lesion(lesion), syntax=syntax, seed=seed)
    with _progress("phantom", slices) as advance:
        write_phantom(settings, out, _increments(advance))
    print(f"phantom of {slices} slices: {out}")


@export_app.command(
    "onnx", epilog="Example: groundglass export onnx --checkpoint unet.safetensors --out model_repository"
)
def export_onnx_command(
    checkpoint: Annotated[Path, typer.Option(help="Trained U-Net: .safetensors, or a .pt/.pth of tensors only.")],
    out: Annotated[Path, typer.Option(help="Model repository to write preprocess/1 and unet/1 into.")],
) -> None:
    """Write the preprocess and unet graphs as ONNX FP32, checked against torch, each with its manifest."""
    with _extra("export"):
        from groundglass_export.onnx_export import export_onnx
    for model_file in export_onnx(checkpoint, out):
        print(model_file)


@app.command(
    epilog="Example: groundglass train --recipe export/recipes/reference.toml --data data/ --minutes 90 --out runs/1"
)
def train(
    recipe: Annotated[Path, typer.Option(help="TOML file that names the data, the stages and the rates.")],
    data: Annotated[Path, typer.Option(envvar="GROUNDGLASS_DATA", help="Folder that the recipe's paths start from.")],
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints and metrics; an interrupted training there continues.")
    ],
    minutes: Annotated[float, typer.Option(min=0.0, help="Length of the training.")],
    imagenet: Annotated[
        Path | None, typer.Option(help="Keras Xception weights as .npz for the encoder; random without it.")
    ] = None,
) -> None:
    """Train the network; print the path of the best checkpoint."""
    with _extra("train"):
        from groundglass_export.training.loop import Budget
        from groundglass_export.training.loop import train as train_network
        from groundglass_export.training.recipe import read_recipe
    with _progress("training, %", 100) as advance:
        show = _increments(advance)
        best = train_network(
            read_recipe(recipe),
            data,
            out,
            Budget(minutes=minutes),
            imagenet,
            lambda line: show(int(100 * line["share"])) if "share" in line else None,
        )
    print(best)


@contextmanager
def _address(server: str | None, repository: Path) -> Iterator[str]:
    """The gRPC address to call: the given one, or that of an embedded server that lives as long as the block."""
    if server is not None:
        yield server
        return
    from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
    from groundglass_ensemble.repository import check_repository

    check_repository(repository, EMBEDDED_CONFIG)
    with EmbeddedTriton(ServeSettings(repository=repository, config_name=EMBEDDED_CONFIG)) as triton:
        yield triton.grpc_address


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Turn a missing optional package into the error that names its extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or name, name) from error


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, shown only on a terminal; gives the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def _increments(advance: Callable[[int], None]) -> Callable[[int], None]:
    """For those who tell how far they are, in place of how much is new."""
    done = 0

    def progress(total: int) -> None:
        nonlocal done
        advance(total - done)
        done = total

    return progress


def _write_results(analysis: ScanAnalysis, out: Path) -> None:
    from groundglass_client.intake import decode_hu
    from groundglass_client.overview import write_overview
    from groundglass_client.writers import write_masks, write_report

    if analysis.masks is not None:
        write_masks(analysis.masks, out / "masks.npz")
    write_overview(analysis.report, analysis.masks, decode_hu, out / "overview.png")
    write_report(analysis.report, out / "report.json")


def _print_summary(report: ScanReport, out: Path | None) -> None:
    left_out = sum(series.slice_count for series in report.study.other_series)
    print(f"verdict: {report.verdict}")
    print(f"longest run: {report.longest_run} positive slices (positive from {report.positive_run})")
    print(f"slices: {report.slice_count}, model version {report.model_version}, {report.seconds:.1f} s")
    for count, what in (
        (left_out, "slices of other series were left"),
        (len(report.study.duplicates), "duplicate slices were left"),
        (len(report.study.refused), "files were refused"),
        (len(report.study.gaps), "gaps between slices"),
    ):
        if count:
            print(f"note: {count} {what}; see the report")
    if out is not None:
        print(f"report: {out / 'report.json'}")
        print(f"overview: {out / 'overview.png'}")
    print("Not for diagnosis.")


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
