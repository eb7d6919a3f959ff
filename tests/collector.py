"""A collector of OpenTelemetry spans over OTLP/HTTP, small enough for a test."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status


@dataclass(frozen=True)
class Collected:
    """One span: its ids in hexadecimal, its attributes as plain values."""

    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    error: str | None


@dataclass
class Collector:
    """What arrived, and where to send to. ``status`` is how it answers."""

    url: str = ""
    status: int = 200
    bodies: list[bytes] = field(default_factory=list)
    _spans: list[Collected] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def spans(self) -> list[Collected]:
        """Everything until now."""
        with self._lock:
            return list(self._spans)

    def take(self, body: bytes, *, json: bool) -> None:
        """Triton sends JSON, the client's exporter protobuf."""
        request = ExportTraceServiceRequest()
        if json:
            json_format.Parse(body, request, ignore_unknown_fields=True)
        else:
            request.ParseFromString(body)
        identity = _as_base64 if json else bytes.hex
        with self._lock:
            self.bodies.append(body)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self._spans += [_collected(span, identity) for span in scope.spans]


def _as_base64(identity: bytes) -> str:
    """OTLP's JSON has ids in hexadecimal, which the parser took for base64, as bytes are elsewhere."""
    return base64.b64encode(identity).decode()


def _collected(span: Span, identity: Callable[[bytes], str]) -> Collected:
    return Collected(
        name=span.name,
        trace=identity(span.trace_id),
        id=identity(span.span_id),
        parent=identity(span.parent_span_id),
        attributes={item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes},
        error=span.status.message if span.status.code == Status.STATUS_CODE_ERROR else None,
    )


@contextmanager
def collector(status: int = 200) -> Iterator[Collector]:
    """A collector that listens as long as the block lasts."""
    collected = Collector(status=status)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collected.take(body, json=self.headers["content-type"] == "application/json")
            self.send_response(collected.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collected.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield collected
        finally:
            server.shutdown()
            thread.join()
