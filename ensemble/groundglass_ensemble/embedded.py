"""A real Triton server inside a ``with`` block: no container, no GPU, no root, nothing left behind."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from groundglass.errors import ServeFailed, SettingError
from groundglass_ensemble import keeper
from groundglass_ensemble.probe import is_ready
from groundglass_ensemble.server_log import PORT_CLASH, failure_reason, services_started
from groundglass_ensemble.wheel import assemble_backends, compile_stages, find_wheel, server_environment

_POLL_S = 0.05
_PORT_ATTEMPTS = 5
_KEEPER_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """How to serve a model repository.

    ``config_name`` chooses ``configs/<name>.pbtxt`` where a model has one, None the production configuration. Port 0
    is any free port. ``control`` "explicit" loads every model at start, and lets clients load and unload them later.
    ``log_file`` is appended to; without one the log goes with the server. ``arguments`` go to ``tritonserver`` as they
    are; they may not turn off the gRPC, HTTP or metrics service, which readiness waits for.
    ``host`` stays loopback unless the network around the machine is trusted: Triton asks nobody for a password.
    """

    repository: Path
    config_name: str | None = "cpu"
    host: str = "127.0.0.1"
    grpc_port: int = 0
    http_port: int = 0
    metrics_port: int = 0
    control: Literal["none", "explicit"] = "none"
    ready_timeout_s: float = 120.0
    stop_grace_s: float = 15.0
    log_file: Path | None = None
    arguments: tuple[str, ...] = ()


class EmbeddedTriton:
    """Runs Triton from the nvidia-pytriton wheel for as long as the ``with`` block lasts.

    Entering returns once the server answers a probing inference; raises ServeFailed with the reason from the server's
    log, MissingExtra without the wheel, SettingError for settings that can't work. The server has a session of its
    own: Ctrl-C in a terminal reaches the caller, which leaves the block, which stops the server in order.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.pid = 0
        self._ports = (settings.grpc_port, settings.http_port, settings.metrics_port)
        self._keeper: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.shm_prefix = ""
        self._log_start = 0

    def __enter__(self) -> EmbeddedTriton:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of the gRPC service."""
        return f"{self.settings.host}:{self._ports[0]}"

    @property
    def http_address(self) -> str:
        """HOST:PORT of the HTTP service."""
        return f"{self.settings.host}:{self._ports[1]}"

    @property
    def metrics_address(self) -> str:
        """HOST:PORT of the Prometheus metrics, at the path ``/metrics``."""
        return f"{self.settings.host}:{self._ports[2]}"

    @property
    def log_file(self) -> Path:
        """What the server and its stages print."""
        if self.settings.log_file is not None:
            return self.settings.log_file.absolute()
        if self._folder is None:
            raise ServeFailed("the server is not running, and its log was not asked to be kept (log_file)")
        return Path(self._folder.name) / "triton.log"

    @property
    def running(self) -> bool:
        """Whether the server's process lives."""
        return self._keeper is not None and self._keeper.poll() is None

    def start(self) -> None:
        """Boot, and return when inference works. See the class for what it raises; nothing is left running then."""
        if self._keeper is not None:
            raise ServeFailed("this server was started already: stop it first")
        settings = self.settings
        if not settings.repository.is_dir():
            raise ServeFailed(f"{settings.repository} is not a folder: a model repository was expected")
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            try:
                self._boot()
                return
            except BaseException as error:
                chosen = 0 in (settings.grpc_port, settings.http_port, settings.metrics_port)
                clash = isinstance(error, ServeFailed) and PORT_CLASH in str(error)
                self.stop()
                # Another process may take a free port between our choice and Triton's binding: choose again.
                if not (clash and chosen and attempt < _PORT_ATTEMPTS):
                    raise

    def stop(self) -> None:
        """Stop the server, its stages and their shared memory. Does nothing when it is not running."""
        if self._keeper is not None:
            self._end(self._keeper)
        self._keeper = None
        self.pid = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _end(self, kept: subprocess.Popen[str]) -> None:
        """Have the keeper end the server; do its work when it does not answer, was killed, or Ctrl-C came again."""
        try:
            kept.stdin.close()  # type: ignore[union-attr]  # the sign to stop the server
            kept.wait(self.settings.stop_grace_s + _KEEPER_GRACE_S)
        except subprocess.TimeoutExpired:
            pass  # what follows ends it by force
        finally:
            kept.kill()
            kept.wait()
            kept.stdout.close()  # type: ignore[union-attr]
            if self.pid:
                keeper.kill_group(self.pid)
            keeper.remove_shared_memory(self.shm_prefix)

    def wait(self, timeout_s: float = math.inf) -> int | None:
        """Wait for the server to end by itself. Returns its exit code, or None after ``timeout_s`` seconds."""
        if self._keeper is None:
            raise ServeFailed("the server is not running")
        deadline = time.monotonic() + timeout_s
        # In short waits: a Ctrl-C that arrives just before a blocking call stays unheard for as long as that lasts.
        while self._keeper.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return self._keeper.poll()

    def failure(self) -> str:
        """Why the server failed, from its log: a line for a person."""
        return failure_reason(self._log_text())

    def _boot(self) -> None:
        wheel = find_wheel()
        environment = server_environment(wheel)
        settings = self.settings
        self._ports = _choose_ports(settings)
        self._folder = tempfile.TemporaryDirectory(prefix="groundglass-serve-", ignore_cleanup_errors=True)
        self.shm_prefix = f"groundglass_{uuid.uuid4().hex[:16]}_"
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log_file.stat().st_size if self.log_file.exists() else 0
        compile_stages(settings.repository)
        backends = assemble_backends(wheel, Path(self._folder.name) / "backends")
        command = [str(wheel.server), *_server_arguments(settings, self._ports, backends, self.shm_prefix)]
        self._keeper = subprocess.Popen(  # noqa: S603
            [
                *(sys.executable, "-I", keeper.__file__),
                *(self.shm_prefix, str(settings.stop_grace_s), str(self.log_file)),
                *command,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self.pid = int(self._keeper.stdout.readline() or 0)  # type: ignore[union-attr]
        self._await_readiness()

    def _await_readiness(self) -> None:
        deadline = time.monotonic() + self.settings.ready_timeout_s
        while time.monotonic() < deadline:
            if not self.running:
                raise ServeFailed(f"the Triton server did not start: {self.failure()}{self._log_hint()}")
            if services_started(self._log_text()) and is_ready(self.grpc_address, deadline - time.monotonic()):
                return
            time.sleep(_POLL_S)
        waited = f"the Triton server was not ready within {self.settings.ready_timeout_s:g} s"
        raise ServeFailed(f"{waited}: {self.failure()}{self._log_hint()}")

    def _log_hint(self) -> str:
        return f" (log: {self.settings.log_file})" if self.settings.log_file else ""

    def _log_text(self) -> str:
        with self.log_file.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")


def _server_arguments(
    settings: ServeSettings, ports: tuple[int, int, int], backends: Path, shm_prefix: str
) -> list[str]:
    host = settings.host
    return [
        f"--model-repository={settings.repository.absolute()}",
        f"--backend-directory={backends}",
        *([f"--model-config-name={settings.config_name}"] if settings.config_name else []),
        *(["--model-control-mode=explicit", "--load-model=*"] if settings.control == "explicit" else []),
        *(f"--grpc-address={host}", f"--grpc-port={ports[0]}"),
        *(f"--http-address={host}", f"--http-port={ports[1]}"),
        *(f"--metrics-address={host}", f"--metrics-port={ports[2]}"),
        # A name of our own, so that exactly this server's regions are removed when it dies.
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        f"--exit-timeout-secs={max(1, int(settings.stop_grace_s) - 2)}",
        *settings.arguments,
    ]


def _choose_ports(settings: ServeSettings) -> tuple[int, int, int]:
    """The given ports, checked, and free ones in place of 0. Raises ServeFailed for a port in use."""
    held: list[socket.socket] = []  # all three stay bound until the last is chosen, so that they differ
    try:
        for port in (settings.grpc_port, settings.http_port, settings.metrics_port):
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            held.append(socket.socket(family, socket.SOCK_STREAM))
            held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a stopped server's port is free at once
            try:
                held[-1].bind((settings.host, port))
            except OverflowError:
                raise SettingError(f"port {port} is out of range: 0 to 65535") from None
            except OSError as error:
                raise ServeFailed(f"port {port} on {settings.host} can't be served: {error.strerror}") from error
        grpc, http, metrics = (bound.getsockname()[1] for bound in held)
        return grpc, http, metrics
    finally:
        for bound in held:
            bound.close()
