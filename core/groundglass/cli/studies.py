"""`groundglass analyze` and `groundglass phantom`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from groundglass.cli.connecting import speaks_tls, tracing
from groundglass.cli.serving import DEFAULT_REPOSITORY, Repository, address
from groundglass.cli.shadowing import shadowing
from groundglass.cli.terminal import increments, progress
from groundglass.tls import TlsSettings

if TYPE_CHECKING:
    from groundglass.report import ScanReport
    from groundglass_client.session import ScanAnalysis


@speaks_tls
def analyze(
    study: Annotated[
        Path, typer.Argument(help="CT study: folder, zip, DICOMDIR or file; or a folder of 8-bit PNG/JPG.")
    ],
    server: Annotated[
        str | None,
        typer.Option(
            help="Triton's gRPC endpoint, HOST:PORT; several with commas share the study. Default: an embedded server, "
            "stopped afterwards."
        ),
    ] = None,
    tls: TlsSettings | None = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json, overview.png and masks.npz.")] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - for stdout.")
    ] = None,
    series: Annotated[str | None, typer.Option(help="SeriesInstanceUID or series number to analyse.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out unusable files and call the verdict partial.")
    ] = False,
    deadline_s: Annotated[float | None, typer.Option(min=0.0, help="Give up after this many seconds.")] = None,
    model_version: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Version of unet that answers. Default: the live one.")
    ] = None,
    canary: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION:SHARE",
            help="Send the study to a candidate version if it is among this share of all studies: 2:0.1 for a tenth.",
        ),
    ] = None,
    shadow: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Have version N answer the same beside it, and count disagreements."),
    ] = None,
    shadow_out: Annotated[
        Path, typer.Option(help="Folder for shadow.json and pictures of the worst slices, with --shadow.")
    ] = Path("out/shadow"),
    trace_to: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="GROUNDGLASS_TRACE_TO",
            help="Send spans of the study and its requests to this OTLP/HTTP endpoint: http://localhost:4318/v1/traces.",
        ),
    ] = None,
    shared_memory: Annotated[
        bool, typer.Option(help="Let a server on this host read the slices from shared memory.")
    ] = True,
    repository: Repository = DEFAULT_REPOSITORY,
) -> None:
    """Send a CT study through the server and print its verdict."""
    from groundglass_client.canary import Canary
    from groundglass_client.connection import connect
    from groundglass_client.intake import decode_hu, open_study
    from groundglass_client.session import SessionSettings, analyse
    from groundglass_client.writers import report_text, write_report

    settings = SessionSettings(
        deadline_s=deadline_s,
        skip_bad=skip_bad,
        masks=out is not None,
        version=None if model_version is None else str(model_version),
        canary=None if canary is None else Canary.parse(canary),
    )
    with open_study(study, skip_bad=skip_bad, series=series) as opened:
        with (
            address(server, repository) as endpoint,
            connect(endpoint, shared_memory=shared_memory, tls=tls) as transport,
            tracing(transport, trace_to, len(opened.slices)) as carrier,
            shadowing(carrier, shadow, shadow_out) as carrier,
            progress("slices", len(opened.slices)) as advance,
        ):
            analysis = analyse(opened, carrier, decode_hu, settings, advance)
        if out is not None:
            _write_results(analysis, out)
    if json_file == "-":
        print(report_text(analysis.report), end="")
        return
    if json_file is not None:
        write_report(analysis.report, Path(json_file))
    _print_summary(analysis.report, out)


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
    with progress("phantom", slices) as advance:
        write_phantom(settings, out, increments(advance))
    print(f"phantom of {slices} slices: {out}")


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
