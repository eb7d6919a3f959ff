"""`groundglass models shadow`: studies replayed through the live version, with a candidate beside it."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from groundglass.cli.connecting import speaks_tls
from groundglass.cli.serving import DEFAULT_REPOSITORY, Repository, address
from groundglass.cli.slices import PHANTOM
from groundglass.cli.terminal import phases
from groundglass.errors import SettingError, VersionRefused
from groundglass.publish import published
from groundglass.tls import TlsSettings

if TYPE_CHECKING:
    from groundglass.study import Study
    from groundglass_client.shadow import ShadowReport, ShadowTransport
    from groundglass_client.transport import Transport

CONNECT_S: Final = 10.0
REPORT_NAME: Final = "shadow.json"


@speaks_tls
def shadow(
    version: Annotated[int, typer.Argument(min=1, help="Number of the candidate, loaded beside the live version.")],
    server: Annotated[
        str | None,
        typer.Option(
            envvar="GROUNDGLASS_SERVER",
            help="Triton's gRPC endpoint, HOST:PORT; several with commas share the work. Default: an embedded server.",
        ),
    ] = None,
    tls: TlsSettings | None = None,
    study: Annotated[
        list[Path] | None, typer.Option(help="CT study to replay; may be given more than once. Default: a phantom.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for shadow.json and pictures of the worst slices.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Replay again and again for so long; 0: once.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    mask_tolerance: Annotated[
        int, typer.Option(min=0, help="Pixels of 512x512 that the masks of a slice may differ by.")
    ] = 0,
    pictures: Annotated[int, typer.Option(min=0, help="Pictures of the worst slices that disagree.")] = 8,
    window: Annotated[int, typer.Option(min=1, help="Requests that the candidate works on at once.")] = 4,
    repository: Repository = DEFAULT_REPOSITORY,
) -> None:
    """Replay studies through the live version and a candidate, and count where they disagree.

    Every request is compared. Exit code 1 when they disagree, or the candidate fails.
    """
    from groundglass_client.connection import connect
    from groundglass_client.shadow import ShadowSettings, ShadowTransport

    settings = ShadowSettings(window=window, patient=True, mask_tolerance=mask_tolerance, pictures=pictures)
    with (
        _opened(study or ()) as studies,
        address(server, repository) as endpoint,
        connect(endpoint, tls=tls) as transport,
        ShadowTransport(transport, str(version), settings) as shadowed,
    ):
        live = shadowed.describe(CONNECT_S).model_version
        if live == str(version):
            raise SettingError(f"version {version} is live: name another one, to be compared with it")
        _replay(studies, shadowed, seconds)
    report = shadowed.report()
    if out is not None:
        _write(report, shadowed, out)
    if as_json:
        print(_text(report), end="")
    else:
        _print(report, out)
    if not report.agrees:
        raise VersionRefused(f"version {version} does not agree with version {live}: {'; '.join(report.complaints)}")


@contextmanager
def shadowing(transport: Transport, version: int | None, out: Path) -> Iterator[Transport]:
    """``transport`` with a candidate beside it, whose report is written to ``out`` at the end; as it is without one.

    Nothing waits for the candidate: requests that find it busy are left out, and counted.
    """
    if version is None:
        yield transport
        return
    from groundglass_client.shadow import ShadowSettings, ShadowTransport

    with ShadowTransport(transport, str(version), ShadowSettings(window=4)) as shadowed:
        yield shadowed
    report = shadowed.report()
    _write(report, shadowed, out)
    word = "agrees" if report.agrees else "; ".join(report.complaints)
    print(f"shadow of version {version}: {word}; {out / REPORT_NAME}", file=sys.stderr)


def _replay(studies: Sequence[Study], transport: ShadowTransport, seconds: float) -> None:
    """Every study once, and then in turns until the seconds are over."""
    from groundglass_client.intake import decode_hu
    from groundglass_client.session import analyse

    began_s = time.monotonic()
    slices, done = sum(len(study.slices) for study in studies), 0
    with phases("shadow") as tell:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            passed = (time.monotonic() - began_s) / seconds if seconds else 1.0
            tell("replay", min(done / slices, passed, 1.0))

        for number, study in enumerate(itertools.cycle(studies)):
            if number >= len(studies) and time.monotonic() - began_s >= seconds:
                return
            analyse(study, transport, decode_hu, on_slices=advance)


@contextmanager
def _opened(studies: Sequence[Path]) -> Iterator[list[Study]]:
    """The studies, for as long as the block lasts; a phantom with a lesion when there are none."""
    from groundglass_client.intake import open_study
    from groundglass_client.phantom import PhantomSettings, write_phantom

    with ExitStack() as stack:
        if not studies:
            phantom = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "phantom"
            write_phantom(PhantomSettings(**PHANTOM), phantom)
            studies = [phantom]
        yield [stack.enter_context(open_study(study)) for study in studies]


def _write(report: ShadowReport, shadowed: ShadowTransport, out: Path) -> None:
    shadowed.write_pictures(out)
    path = out / REPORT_NAME
    try:
        with published(path) as beside:
            beside.write_text(_text(report), encoding="utf-8")
    except OSError as error:
        raise SettingError(f"{path} can't be written: {error.strerror or error}") from error


def _text(report: ShadowReport) -> str:
    return json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"


def _print(report: ShadowReport, out: Path | None) -> None:
    print(report.as_text())
    if out is not None:
        print(f"report: {out / REPORT_NAME}")
        print(f"pictures: {len(report.worst)} in {out}")
