"""What Triton's log says about a start: which services run, and why it failed."""

from __future__ import annotations

import re

PORT_CLASH = "already in use"
"""Part of Triton's words for a port that another process took."""

_SERVICES = ("Started GRPCInferenceService", "Started HTTPService", "Started Metrics Service")
_ERROR = re.compile(r'^E\d{4} \S+ \d+ \S+\] "?(?P<text>.*?)"?$', re.MULTILINE)
_FATAL = re.compile(
    r"^(?:error|failed): (?P<text>.*)$|^(?P<start>failed to start .*|.*unrecognized option .*)$",
    re.MULTILINE | re.IGNORECASE,
)
_LOAD = re.compile(r"failed to load '(?P<model>[^']+)' version (?P<version>\d+): (?P<reason>.*)")
_TRACEBACK = re.compile(r"(?:\\n)+At:.*")  # Triton writes a Python error into one line, its line breaks escaped
_HARMLESS = ("CudaDriverHelper", "unable to create stream", "NVML", "DCGM", "CUDA driver version")
"""What Triton calls an error on every machine without a GPU."""

_MAX_REASONS = 3


def services_started(log: str) -> bool:
    """Whether gRPC, HTTP and metrics all listen. Triton starts metrics last, and ends when one of them can't start."""
    return all(service in log for service in _SERVICES)


def failure_reason(log: str) -> str:
    """The cause of a failed start in one line: the models that did not load and why, else the last error in the log."""
    fatal = [match["text"] or match["start"] for match in _FATAL.finditer(log)]
    errors = [match["text"] for match in _ERROR.finditer(log) if not _is_harmless(match["text"])]
    clash = [text for text in (*fatal, *errors) if PORT_CLASH in text]
    loads = [_LOAD.search(text) for text in errors]
    models = [f"model '{load['model']}' version {load['version']}: {load['reason']}" for load in loads if load]
    causes = clash or models or errors or [text for text in fatal if not _is_harmless(text)] or log.split("\n")[-4:]
    lines = [" ".join(_TRACEBACK.sub("", cause).split()) for cause in causes]
    return "; ".join(list(dict.fromkeys(line for line in lines if line))[:_MAX_REASONS])


def _is_harmless(text: str) -> bool:
    return any(part in text for part in _HARMLESS)
