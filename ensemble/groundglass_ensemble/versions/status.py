"""Status: every version's state, told from files, journal and servers, and where these three differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from groundglass.errors import RepositoryError, ServerError
from groundglass.manifest import check_digest, read_manifest
from groundglass_ensemble.versions.control import Served, ServerControl
from groundglass_ensemble.versions.desk import PROMOTE, RETIRE, ROLLBACK, Desk, lines_up
from groundglass_ensemble.versions.promoting import is_verified, previous_version


class State(str, Enum):
    """Where a version stands. ``LOADED`` is what no command of ours leaves: loaded by the files, and never verified."""

    STAGED = "staged"
    VERIFIED = "verified"
    LIVE = "live"
    RETIRED = "retired"
    LOADED = "loaded, not verified"


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """One version by the files: ``digests`` are short, of its model files by name."""

    version: int
    state: str
    precision: str
    thresholds: str
    digests: dict[str, str]
    rollback_target: bool


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One server: what it serves, or why it can't be asked."""

    address: str
    served: Served | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """Everything, and ``problems``: what differs, or was interrupted, in words for a person."""

    versions: tuple[VersionStatus, ...]
    servers: tuple[ServerStatus, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "live": next((item.version for item in self.versions if item.state == State.LIVE.value), None),
            "versions": [asdict(item) for item in self.versions],
            "servers": [asdict(item) for item in self.servers],
            "problems": list(self.problems),
        }

    def as_text(self) -> str:
        """As lines for a person."""
        return "\n".join((*map(_version_line, self.versions), *map(_server_line, self.servers), *_problem_lines(self)))


def status(desk: Desk) -> Status:
    """What is true now; nothing is changed, and nothing is waited for but the servers' answers."""
    servers = tuple(map(_server, desk.servers))
    return Status(_versions(desk, servers), servers, tuple(_problems(desk, servers)))


def servers_alone(servers: Sequence[ServerControl]) -> Status:
    """What servers serve, told without their repository."""
    found = tuple(map(_server, servers))
    return Status((), found, tuple(server.problem for server in found if server.served is None))


def _server(server: ServerControl) -> ServerStatus:
    """What one server serves."""
    try:
        return ServerStatus(server.address, server.served())
    except ServerError as error:
        return ServerStatus(server.address, None, str(error))


def _versions(desk: Desk, servers: Sequence[ServerStatus]) -> tuple[VersionStatus, ...]:
    live = desk.folder.live()
    if live is None:  # a plain repository: what Triton would take
        serving = {server.served.live for server in servers if server.served is not None}
        live = next(iter(serving)) if len(serving) == 1 else max(desk.folder.versions(), default=None)
    target = previous_version(desk)
    return tuple(_version(desk, version, live, version == target) for version in desk.folder.versions())


def _version(desk: Desk, version: int, live: int | None, is_target: bool) -> VersionStatus:
    manifests = desk.folder.known_manifests(version)
    thresholds = {f"{name} {value}" for item in manifests.values() for name, value in sorted(item.calibration.items())}
    return VersionStatus(
        version=version,
        state=_state(desk, version, live).value,
        precision=" ".join(sorted({item.precision for item in manifests.values()})) or "unknown",
        thresholds=", ".join(sorted(thresholds)) or "unknown",
        digests={name: digest[:12] for name, digest in desk.folder.digests(version).items()},
        rollback_target=is_target,
    )


def _state(desk: Desk, version: int, live: int | None) -> State:
    if version == live:
        return State.LIVE
    if version in (desk.folder.loaded() or ()):
        return State.VERIFIED if _was_live(desk, version) or is_verified(desk, version) else State.LOADED
    last = desk.journal.last_done(version)
    return State.RETIRED if last is not None and last.action == RETIRE else State.STAGED


def _was_live(desk: Desk, version: int) -> bool:
    return any(
        record.details.get("from") == version and record.action in (PROMOTE, ROLLBACK)
        for record in desk.journal.records()
    )


def _problems(desk: Desk, servers: Sequence[ServerStatus]) -> Iterator[str]:
    folder = desk.folder
    pending = desk.journal.pending()
    if pending is not None:
        yield (
            f"{pending.action} of version {pending.version} by {pending.who} at {pending.time} has no end: it is at "
            "work, or was interrupted; the next command settles it"
        )
    if not folder.agreed():
        yield f"the configs of {folder.path} differ in their versions; the next command settles it"
    for version in folder.versions():
        for file in folder.model_files(version):
            try:
                check_digest(file, read_manifest(file))
            except RepositoryError as error:
                yield f"version {version}: {error}"
    for server in servers:
        if server.served is None:
            yield server.problem
        elif not lines_up(folder, server.served):
            yield f"{server.address} does not serve what the files say; the next command settles it"


def _version_line(item: VersionStatus) -> str:
    files = ", ".join(f"{name} {digest}" for name, digest in sorted(item.digests.items())) or "no model file"
    target = ", rollback target" if item.rollback_target else ""
    return f"version {item.version}: {item.state}{target}; {item.precision}; {item.thresholds}; {files}"


def _server_line(server: ServerStatus) -> str:
    if server.served is None:
        return f"server {server.address}: away"
    served = server.served
    loaded = ", ".join(map(str, served.loaded)) or "none"
    return f"server {server.address}: Triton {served.triton}, live {served.live}, loaded {loaded}"


def _problem_lines(status: Status) -> Iterator[str]:
    for problem in status.problems:
        yield f"problem: {problem}"
