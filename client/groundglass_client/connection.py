"""Connecting: from what a user types to the transport that carries a study."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from groundglass.errors import SettingError
from groundglass.tls import TlsSettings
from groundglass_client.buffers import Buffers
from groundglass_client.replicas import ReplicaTransport
from groundglass_client.transport import GrpcTransport, Transport


@contextmanager
def connect(
    servers: str, *, shared_memory: bool = True, channels: int = 1, tls: TlsSettings | None = None
) -> Iterator[Transport]:
    """A transport to ``servers``, HOST:PORT of one server or of several with commas between, open inside the block.

    With ``shared_memory`` slices are left where a server on this host reads them itself, and travel as bytes to one
    that can't. With ``tls`` they travel as bytes: who is reached so is elsewhere, or behind a balancer that spreads
    requests over several hosts. The block's end takes every region back. Raises SettingError for what is no address.
    """
    addresses = [address.strip() for address in servers.split(",")]
    if len(set(addresses)) < len(addresses):
        raise SettingError(f"server {servers!r}: the same address stands twice")
    with ExitStack() as stack:
        buffers = Buffers(shared=shared_memory and tls is None)
        replicas = [
            stack.enter_context(GrpcTransport(address, buffers, channels=channels, tls=tls)) for address in addresses
        ]
        stack.enter_context(closing(buffers))  # before the channels close: servers must be asked to let go
        yield replicas[0] if len(replicas) == 1 else ReplicaTransport(replicas)
