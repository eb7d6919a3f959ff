"""The locustfile: studies as locust's requests. It must be started by locust, which patches the standard library first.

locust -f benchmarks/locustfile.py --host localhost:8001
"""

# locust says that it is typed, and leaves its events untyped.
# mypy: disable-error-code="no-untyped-call, untyped-decorator"

from __future__ import annotations

import gc
import itertools
import logging
import os
import sys
from argparse import BooleanOptionalAction
from pathlib import Path
from typing import Any, ClassVar

import gevent
import grpc.experimental.gevent  # type: ignore[import-untyped]
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import LocalRunner

from groundglass.errors import GroundglassError, SettingError
from groundglass.tls import TlsSettings
from groundglass_bench.load.contact import check_server
from groundglass_bench.load.samples import Clock, Record, Sample, write_record
from groundglass_bench.load.settings import OPTIONS, Load, parse_load
from groundglass_bench.load.sources import Seat, Source, make_source
from groundglass_bench.load.studies import Phantoms

log = logging.getLogger(__name__)

_UNTIL_STOPPED_S = 1e9  # a load without --run-time


class Campaign:
    """The load of this process: what is common to its users."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._clock = Clock()
        self._process = 0
        self._numbers = itertools.count()
        self._record = Record(0.0, 0.0)
        self._load: Load | None = None
        self._phantoms: Phantoms | None = None
        self._tls: TlsSettings | None = None

    def prepare(self) -> None:
        """Read the options as they are now, which the web page may have changed, and check that the server answers.

        Raises SettingError, ServerUnreachable, ServerRefused.
        """
        options = self._options
        if options.samples and not isinstance(self._environment.runner, LocalRunner):
            raise SettingError("--samples can't be combined with --master, --worker or --processes")
        users = 1 if options.num_users is None else options.num_users
        load = parse_load(vars(options), users, options.run_time or _UNTIL_STOPPED_S)
        if options.samples:
            _require_writable(Path(options.samples))
        self._tls = TlsSettings.of_environment(os.environ)  # locust has a --tls-cert of its own, for its web page
        check_server(self._server, self._tls)
        if self._phantoms is None or load != self._load:
            self._phantoms = Phantoms(load.slice_range[1])
        self._load = load

    def on_test_start(self, environment: Environment, **_: Any) -> None:
        """A load starts; one that can't be made is stopped again, with the reason in the log."""
        self._numbers = itertools.count()
        try:
            if not self._options.headless:
                self.prepare()
        except GroundglassError as error:
            log.error("%s", error)
            self._load = None
            if environment.runner is not None:
                gevent.spawn_later(1.0, environment.runner.stop)
            return
        self._record = Record(self._clock.now_s(), 0.0)
        if self._load is not None and self._load.warm_up_s:
            gevent.spawn_later(self._load.warm_up_s, environment.stats.reset_all)

    def on_test_stopping(self, environment: Environment, **_: Any) -> None:
        """No more studies start."""
        self._record.stopped_s = self._clock.now_s()

    def on_test_stop(self, environment: Environment, **_: Any) -> None:
        """The last study has its report, or was cut off."""
        if self._options.samples and self._load is not None:
            write_record(self._record, Path(self._options.samples))

    def join(self) -> Source | None:
        """What a new user does; None when there is no load to make."""
        if self._load is None or self._phantoms is None:
            return None
        seat = Seat(self._options.part or getattr(self._environment.runner, "worker_index", 0), next(self._numbers))
        return make_source(self._load, self._server, self._phantoms, self.report, seat, tls=self._tls)

    def report(self, sample: Sample) -> None:
        """Keep a sample, and tell locust."""
        self._record.samples.append(sample)
        self._environment.events.request.fire(
            request_type="gRPC" if sample.sent else "refused",
            name="study",
            response_time=sample.seconds * 1000,
            response_length=sample.slices,
            exception=None if sample.ok else GroundglassError(sample.error),
            context={},
        )

    @property
    def _server(self) -> str:
        server: str | None = self._environment.host
        if not server:
            raise SettingError("no server: give --host HOST:PORT, Triton's gRPC endpoint")
        return server

    @property
    def _options(self) -> Any:
        return self._environment.parsed_options


def _require_writable(file: Path) -> None:
    """Raise SettingError for a file that could not be written once the load is over."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"--samples {file}: {error.strerror}") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise SettingError(f"--samples {file}: no file can be written there")


class StudyUser(User):
    """Sends whole studies: one after the other, or as they arrive (``--loop open``)."""

    campaign: ClassVar[Campaign]

    def on_start(self) -> None:
        """Connect."""
        self._source = self.campaign.join()

    @task
    def send(self) -> None:
        """Send a study, or all that have arrived."""
        if self._source is not None:
            self._source.work()

    def wait_time(self) -> float:
        """Seconds until the next study."""
        return 1.0 if self._source is None else self._source.pause_s()

    def on_stop(self) -> None:
        """Wait for what is in flight, as long as ``--stop-timeout`` allows."""
        if self._source is not None:
            self._source.finish(self.environment.stop_timeout or 0.0)


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """The fields of a load, as options of the command line and of the web page."""
    for option in OPTIONS:
        kind: dict[str, Any] = {"action": BooleanOptionalAction} if option.kind is bool else {"type": option.kind}
        parser.add_argument(option.flag, dest=option.field, default=option.default, help=option.help, **kind)
    parser.add_argument(
        "--samples", default="", include_in_web_ui=False, help="File for every study's times and fate, as JSON."
    )
    parser.add_argument(
        "--part",
        type=int,
        default=0,
        include_in_web_ui=False,
        help="Which part of one load this process makes, from 0.",
    )


def let_channels_go(**_: Any) -> None:
    """Free what is left of gRPC's channels while greenlets still run.

    Closed channels wait in reference cycles. Where the interpreter's own end frees them, gRPC's threads of gevent are
    gone, one of them with gRPC's lock, and the process never ends (grpcio 1.85, November 2026).
    """
    gc.collect()


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Make gRPC wait in greenlets before a channel opens; end a load that can't be made with one line."""
    grpc.experimental.gevent.init_gevent()
    campaign = StudyUser.campaign = Campaign(environment)
    environment.events.test_start.add_listener(campaign.on_test_start)
    environment.events.test_stopping.add_listener(campaign.on_test_stopping)
    environment.events.test_stop.add_listener(campaign.on_test_stop)
    environment.events.quit.add_listener(let_channels_go)
    if not (environment.parsed_options and environment.parsed_options.headless):
        return
    try:
        campaign.prepare()
    except GroundglassError as error:
        print(f"groundglass: {error}", file=sys.stderr)
        sys.exit(1)
