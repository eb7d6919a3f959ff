"""How commands reach a server: the TLS options of all of them, and tracing."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from groundglass.cli.terminal import extra
from groundglass.errors import SettingError
from groundglass.tls import CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE, TLS_VARIABLE, TlsSettings

if TYPE_CHECKING:
    from groundglass_client.transport import Transport

_OPTIONS: Final[dict[str, tuple[Any, Any]]] = {
    "tls": (
        Annotated[
            bool,
            typer.Option("--tls", envvar=TLS_VARIABLE, help="Speak TLS, with a server whose CA this system trusts."),
        ],
        False,
    ),
    "tls_ca": (
        Annotated[
            Path | None,
            typer.Option(envvar=CA_VARIABLE, help="Speak TLS, with a server whose CA is in this PEM file."),
        ],
        None,
    ),
    "tls_cert": (
        Annotated[
            Path | None,
            typer.Option(
                envvar=CERTIFICATE_VARIABLE, help="Certificate of this client, PEM, for a server that asks for one."
            ),
        ],
        None,
    ),
    "tls_key": (
        Annotated[Path | None, typer.Option(envvar=KEY_VARIABLE, help="Its private key, PEM.")],
        None,
    ),
}


def speaks_tls(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the TLS options, in place of its parameter ``tls``, which gets what they come to.

    It must have a parameter ``server`` too: without one there is nobody to speak TLS with, and SettingError is raised.
    """
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(*, tls: bool, tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None, **given: Any) -> None:
        command(**given, tls=_tls_settings(given["server"], tls, ca=tls_ca, certificate=tls_cert, key=tls_key))

    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name != "tls":
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        if parameter.name == "server":
            parameters += [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=option, default=default)
                for name, (option, default) in _OPTIONS.items()
            ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


@contextmanager
def tracing(transport: Transport, url: str | None, slices: int) -> Iterator[Transport]:
    """``transport`` with the spans of one study sent to ``url``; as it is without one."""
    if url is None:
        yield transport
        return
    with extra("tracing"):
        from groundglass_client.tracing import traced
    # What it says of every failed attempt to send spans, ours says once.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    with traced(transport, url, slices) as carrier:
        yield carrier


def _tls_settings(
    server: str | None, tls: bool, *, ca: Path | None, certificate: Path | None, key: Path | None
) -> TlsSettings | None:
    if not (tls or ca or certificate or key):
        return None
    if server is None:
        raise SettingError(
            "TLS is asked for, by an option or GROUNDGLASS_TLS*, and no server: name it with --server (the embedded "
            "one speaks plain gRPC on this machine alone)"
        )
    return TlsSettings(ca, certificate, key)
