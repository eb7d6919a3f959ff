"""`groundglass models`: versions of the network, swapped while services keep calling."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from groundglass.cli.connecting import speaks_tls
from groundglass.cli.serving import DEFAULT_REPOSITORY, Repository
from groundglass.cli.shadowing import shadow
from groundglass.errors import GroundglassError, SettingError, VersionRefused
from groundglass.tls import TlsSettings

if TYPE_CHECKING:
    from groundglass_ensemble.versions import Desk, Verification

log = logging.getLogger(__name__)

models_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Swap versions of the network under load: stage, verify, promote, roll back, retire.",
)

Version = Annotated[int, typer.Argument(min=1, help="Number of the version.")]
Servers = Annotated[
    str | None,
    typer.Option(
        "--server",
        envvar="GROUNDGLASS_SERVER",
        help="gRPC endpoint HOST:PORT of every Triton that serves the repository, with commas between.",
    ),
]
Headers = Annotated[
    list[str],
    typer.Option(
        "--control-header",
        envvar="GROUNDGLASS_CONTROL_HEADER",
        metavar="KEY=VALUE",
        help="Sent with every call, for a Triton that asks for a key: triton-grpc-protocol-<its key>=<its value>.",
    ),
]
Who = Annotated[str | None, typer.Option(envvar="GROUNDGLASS_WHO", help="Who signs the journal. Default: user@host.")]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON, a refusal too.")]
NewThresholds = Annotated[
    bool, typer.Option("--new-thresholds", help="Allow other thresholds than the live version's: it decides otherwise.")
]
NO_HEADERS: Final[list[str]] = []


@models_app.command(epilog="Example: groundglass models status --server localhost:8001")
@speaks_tls
def status(
    server: Servers = None,
    tls: TlsSettings | None = None,
    repository: Repository = DEFAULT_REPOSITORY,
    control_header: Headers = NO_HEADERS,
    check: Annotated[bool, typer.Option("--check", help="Fail when there is a problem.")] = False,
    json_out: Json = False,
) -> None:
    """Print every version's state, what the servers serve, and where files, journal and servers differ."""
    from groundglass_ensemble.versions import servers_alone, status

    with _answering(json_out):
        if server is not None and not repository.is_dir():
            with _controls(server, control_header, tls) as controls:
                state = servers_alone(controls)
        else:
            with _desk(repository, server, control_header, tls=tls) as desk:
                state = status(desk)
        _print(state.to_json(), state.as_text(), as_json=json_out)
        if check and state.problems:
            raise VersionRefused(f"{repository}: {'; '.join(state.problems)}")


@models_app.command(epilog="Example: groundglass models stage build/int8/model.onnx --server localhost:8001")
@speaks_tls
def stage(
    files: Annotated[list[Path], typer.Argument(help="Model files with their manifests: model.onnx, model.plan.")],
    version: Annotated[int | None, typer.Option(min=1, help="Number to give it. Default: the next.")] = None,
    golden: Annotated[
        Path | None, typer.Option(help="Golden answers of its FP32 reference (export golden), kept with it.")
    ] = None,
    new_thresholds: NewThresholds = False,
    server: Servers = None,
    tls: TlsSettings | None = None,
    repository: Repository = DEFAULT_REPOSITORY,
    control_header: Headers = NO_HEADERS,
    who: Who = None,
    json_out: Json = False,
) -> None:
    """Copy a new version into the repository, where no server loads it yet."""
    from groundglass_ensemble.versions import stage

    beside = () if golden is None else (golden,)
    with _answering(json_out), _desk(repository, server, control_header, who, tls=tls) as desk:
        number = stage(desk, files, version=version, beside=beside, new_thresholds=new_thresholds)
        _print({"version": number, "state": "staged"}, f"version {number} is staged", as_json=json_out)


@models_app.command(epilog="Example: groundglass models verify 2 --server localhost:8001")
@speaks_tls
def verify(
    version: Version,
    server: Servers = None,
    tls: TlsSettings | None = None,
    golden: Annotated[
        Path | None, typer.Option(help="Golden answers. Default: golden.npz of the version, or of unet, that fits.")
    ] = None,
    study: Annotated[
        list[Path], typer.Option("--study", help="CT study that the golden answers are of. Default: their phantom.")
    ] = [],  # noqa: B006  typer copies it
    latency_ratio: Annotated[
        float, typer.Option(min=0.0, help="Latency allowed, over the live version's (median of pairs).")
    ] = 1.5,
    evidence: Annotated[Path, typer.Option(help="Folder for parity.json and a picture of the worst slice.")] = Path(
        "out/verify"
    ),
    new_thresholds: NewThresholds = False,
    repository: Repository = DEFAULT_REPOSITORY,
    control_header: Headers = NO_HEADERS,
    who: Who = None,
    json_out: Json = False,
) -> None:
    """Load a version beside the live one, try it through the servers, and say go or no-go."""
    from groundglass.cli.trial import TrialSettings, trial_of
    from groundglass_ensemble.versions import verify

    settings = TrialSettings(repository, golden, tuple(study), latency_ratio, evidence, tls)

    tables: list[Verification] = []

    def tell(verification: Verification) -> None:
        tables.append(verification)
        _print(verification.to_json(), verification.as_text(), as_json=json_out)

    # A refusal that has a table has told its reasons.
    with _answering(lambda: json_out and not tables), _desk(repository, server, control_header, who, tls=tls) as desk:
        verify(desk, version, trial_of(settings), new_thresholds=new_thresholds, tell=tell)


@models_app.command(epilog="Example: groundglass models promote 2 --server localhost:8001")
@speaks_tls
def promote(
    version: Version,
    server: Servers = None,
    tls: TlsSettings | None = None,
    watch_s: Annotated[
        float, typer.Option(min=0.0, help="Watch it for so long, and roll back by itself if it fails.")
    ] = 10.0,
    failure_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of its inferences that may fail meanwhile.")
    ] = 0.01,
    repository: Repository = DEFAULT_REPOSITORY,
    control_header: Headers = NO_HEADERS,
    who: Who = None,
    json_out: Json = False,
) -> None:
    """Make a verified version the live one; the old one stays loaded for a rollback."""
    from groundglass_ensemble.versions import Watch, promote

    with _answering(json_out), _desk(repository, server, control_header, who, tls=tls) as desk:
        promote(desk, version, Watch(watch_s, failure_share))
        _print_live(desk, json_out)


@models_app.command(epilog="Example: groundglass models rollback --server localhost:8001")
@speaks_tls
def rollback(
    server: Servers = None,
    tls: TlsSettings | None = None,
    to: Annotated[int | None, typer.Option(min=1, help="Version. Default: the one that was live before.")] = None,
    repository: Repository = DEFAULT_REPOSITORY,
    control_header: Headers = NO_HEADERS,
    who: Who = None,
    json_out: Json = False,
) -> None:
    """Make the version live again that was live before."""
    from groundglass_ensemble.versions import rollback

    with _answering(json_out), _desk(repository, server, control_header, who, tls=tls) as desk:
        rollback(desk, to)
        _print_live(desk, json_out)


@models_app.command(epilog="Example: groundglass models retire 1 --server localhost:8001")
@speaks_tls
def retire(
    version: Version,
    server: Servers = None,
    tls: TlsSettings | None = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete its files too.")] = False,
    drain_s: Annotated[float, typer.Option(min=0.0, help="Wait so long for studies that ask for it.")] = 60.0,
    repository: Repository = DEFAULT_REPOSITORY,
    control_header: Headers = NO_HEADERS,
    who: Who = None,
    json_out: Json = False,
) -> None:
    """Have the servers let go of a version that is not live."""
    from groundglass_ensemble.versions import retire

    with _answering(json_out), _desk(repository, server, control_header, who, tls=tls) as desk:
        retire(desk, version, delete=delete, drain_s=drain_s)
        state = "deleted" if delete else "retired"
        _print({"version": version, "state": state}, f"version {version} is {state}", as_json=json_out)


@models_app.command(epilog="Example: groundglass models history --json")
def history(repository: Repository = DEFAULT_REPOSITORY, json_out: Json = False) -> None:
    """Print the journal: who did what to which version, when, and why it was refused."""
    from groundglass_ensemble.versions import Journal

    with _answering(json_out):
        records = Journal(repository).records()
        lines = [
            f"{item.time}  {item.who}  {item.action} {item.version}: {item.outcome}"
            + (f", {item.reason}" if item.reason else "")
            for item in records
        ]
        _print([asdict(item) for item in records], "\n".join(lines) or "nothing was done yet", as_json=json_out)


models_app.command(epilog="Example: groundglass models shadow 2 --server localhost:8001 --study study/")(shadow)


@contextmanager
def _answering(json_out: bool | Callable[[], bool]) -> Iterator[None]:
    """With ``--json`` a refusal is JSON on stdout too, beside its line on stderr."""
    try:
        yield
    except GroundglassError as error:
        if json_out() if callable(json_out) else json_out:
            print(json.dumps({"refused": str(error), "kind": type(error).__name__}, indent=2))
        raise


@contextmanager
def _controls(server: str | None, headers: list[str], tls: TlsSettings | None) -> Iterator[list[Any]]:
    from groundglass_ensemble.versions import ServerControl

    pairs = [text.partition("=") for text in headers]
    for text, (key, equals, _) in zip(headers, pairs, strict=True):
        if not key or not equals:
            raise SettingError(f"--control-header {text!r}: expected KEY=VALUE")
    sent = {key: value for key, _, value in pairs}
    with ExitStack() as stack:
        addresses = [] if server is None else [address.strip() for address in server.split(",")]
        yield [stack.enter_context(ServerControl(address, sent, tls=tls)) for address in addresses]


@contextmanager
def _desk(
    repository: Path, server: str | None, headers: list[str], who: str | None = None, *, tls: TlsSettings | None
) -> Iterator[Desk]:
    from groundglass_ensemble.versions import Desk, Journal, VersionFolder

    folder = VersionFolder(repository)
    with _controls(server, headers, tls) as controls:
        yield Desk(folder, Journal(repository, who), controls, log.info)


def _print(content: Any, text: str, *, as_json: bool) -> None:
    print(json.dumps(content, indent=2) if as_json else text, flush=True)


def _print_live(desk: Desk, json_out: bool) -> None:
    from groundglass_ensemble.versions import previous_version

    live, previous = desk.folder.live(), previous_version(desk)
    text = f"version {live} is live; a rollback makes it {previous}"
    _print({"live": live, "rollback_target": previous}, text, as_json=json_out)
