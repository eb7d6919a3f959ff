"""First contact: how a load reaches its server, and whether the server is there at all."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final

from groundglass.tls import TlsSettings
from groundglass_client.connection import connect
from groundglass_client.transport import Transport

_PATIENCE_S: Final = 5.0


def open_transport(
    server: str, *, shared_memory: bool, tls: TlsSettings | None = None
) -> AbstractContextManager[Transport]:
    """The way to ``server``, HOST:PORT or several with commas. Raises SettingError when it is no such thing."""
    return connect(server, shared_memory=shared_memory, tls=tls)


def check_server(server: str, tls: TlsSettings | None = None) -> None:
    """Raise ServerUnreachable or ServerRefused unless ``server`` can take studies now."""
    with open_transport(server, shared_memory=False, tls=tls) as transport:
        transport.describe(_PATIENCE_S)
