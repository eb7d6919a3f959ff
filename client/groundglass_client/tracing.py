"""Tracing: a study and its requests as OpenTelemetry spans, which the server's own spans join.

Spans hold counts, bytes, model names and versions. Nothing of them says whose study it was, or where it lies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Final
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from groundglass import contract
from groundglass.errors import SettingError
from groundglass_client.buffers import Buffers
from groundglass_client.requests import Request, Tensors
from groundglass_client.transport import ServedScan, Transport

log = logging.getLogger(__name__)

EXPORT_TIMEOUT_S: Final = 5.0
"""Longest that the end of a study waits for a collector that does not answer."""


@contextmanager
def traced(transport: Transport, url: str, slices: int) -> Iterator[Transport]:
    """``transport`` for one study of ``slices``, whose spans go to ``url``, the OTLP/HTTP endpoint of a collector.

    The study's span lasts as long as the block. A collector that takes no spans costs a warning, and no study. Raises
    SettingError for what is no such URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingError(
            f"traces to {url!r}: expected the OTLP/HTTP endpoint of a collector, such as "
            "http://localhost:4318/v1/traces"
        )
    # Of our own making: what the environment adds to a resource may name a machine, a user or a path.
    provider = TracerProvider(resource=Resource({SERVICE_NAME: "groundglass"}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_Telling(url)))
    tracer = provider.get_tracer("groundglass_client")
    study = tracer.start_span("study", attributes={"groundglass.slices": slices})
    try:
        yield TracingTransport(transport, tracer, study)
    except BaseException as error:
        _fail(study, error)
        raise
    finally:
        study.end()
        provider.shutdown()


class TracingTransport:
    """A transport whose inferences are spans below a study's. Threads may share it."""

    def __init__(self, transport: Transport, tracer: Tracer, study: Span) -> None:
        self._transport = transport
        self._tracer = tracer
        self._study = study

    def buffers(self) -> Buffers:
        """See ``Transport.buffers``."""
        return self._transport.buffers()

    def describe(self, timeout_s: float) -> ServedScan:
        """See ``Transport.describe``. The study's span learns which version is live."""
        served = self._transport.describe(timeout_s)
        self._study.set_attribute("groundglass.live_version", served.model_version)
        return served

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        """See ``Transport.send``: with the span's identity, so that the server's spans become its children."""
        span = self._tracer.start_span(
            f"infer {request.model.name}",
            set_span_in_context(self._study),
            SpanKind.CLIENT,
            attributes={
                "groundglass.slices": len(request.tensors[contract.SLICE_INDEX.name]),
                "groundglass.bytes": sum(tensor.nbytes for tensor in request.tensors.values()),
                "groundglass.model_version": request.pin or request.live or "any",
            },
        )
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
        try:
            future = self._transport.send(replace(request, traceparent=carrier["traceparent"]), timeout_s)
        except BaseException as error:
            _fail(span, error)
            span.end()
            raise
        future.add_done_callback(partial(_end, span))
        return future


class _Telling(SpanExporter):
    """Sends spans to a collector, and warns once when it does not take them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._exporter: SpanExporter = OTLPSpanExporter(url, timeout=EXPORT_TIMEOUT_S)
        self._told = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See ``SpanExporter.export``."""
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS and not self._told:
            self._told = True
            log.warning("%s takes no traces, so this study's lack spans: is it the OTLP/HTTP endpoint?", self._url)
        return result

    def shutdown(self) -> None:
        """See ``SpanExporter.shutdown``."""
        self._exporter.shutdown()


def _end(span: Span, answer: Future[Tensors]) -> None:
    if answer.cancelled():
        span.set_status(Status(StatusCode.ERROR, "cancelled"))
    elif (error := answer.exception()) is not None:
        _fail(span, error)
    span.end()


def _fail(span: Span, error: BaseException) -> None:
    """Its kind alone: the words of an error may name a file of the study."""
    span.set_status(Status(StatusCode.ERROR, type(error).__name__))
