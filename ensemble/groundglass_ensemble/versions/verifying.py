"""Verify: a version is loaded beside the live one and tried through the servers, before anybody depends on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from groundglass import contract
from groundglass.errors import ServerError, VersionRefused
from groundglass.manifest import Manifest
from groundglass_ensemble.versions.checks import Check, check_files, require
from groundglass_ensemble.versions.control import ServerControl
from groundglass_ensemble.versions.desk import VERIFY, Desk, log, take_away


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a trial is about: ``version`` can be asked for by name at ``address``, and ``live`` too."""

    address: str
    version: int
    live: int
    manifest: Manifest


Trial = Callable[[Candidate], Sequence[Check]]
"""A trial through one server: golden study, parity gate, latency. It raises nothing for a candidate that fails."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at, of which version; ``go`` when all of it passed."""

    version: int
    checks: tuple[Check, ...]

    @property
    def go(self) -> bool:
        """Whether the version may be promoted."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        rows = [
            {"check": check.what, "found": check.found, "allowed": check.allowed, "passed": check.passed}
            for check in self.checks
        ]
        return {"version": self.version, "go": self.go, "checks": rows}

    def as_text(self) -> str:
        """As a table."""
        rows = [("check", "found", "allowed", ""), *((c.what, c.found, c.allowed, _word(c)) for c in self.checks)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip() for row in rows
        ]
        return "\n".join((*lines, f"version {self.version}: {'go' if self.go else 'NO-GO'}"))


def verify(
    desk: Desk,
    version: int,
    trial: Trial,
    *,
    new_thresholds: bool = False,
    tell: Callable[[Verification], None] = lambda verification: None,
) -> Verification:
    """Staged, retired -> verified: load a version beside the live one on every server, and try it there.

    Until everything has passed it is in the servers' memory only, so that a server that dies of it comes back without
    it. Then the files load it too: it can be asked for by name (canary, shadow) and promoted at once. ``tell`` gets the
    table, go or no-go. Raises VersionRefused when it is no-go; the live version serves on either way.
    """
    with desk.operation(VERIFY, version) as work:
        desk.require_servers()
        if version not in desk.folder.versions():
            raise VersionRefused(f"there is no version {version}: {desk.folder.path} holds {desk.folder.versions()}")
        live = desk.live()
        if version == live:
            raise VersionRefused(f"version {version} is live: there is nothing to verify it against")
        work.digests.update(desk.folder.digests(version))
        checks = list(_static(desk, version, live, new_thresholds=new_thresholds))
        try:
            require(version, checks, f"version {live} serves on")
            for server in desk.servers:
                checks += _tried(desk, server, version, trial)
            require(version, checks, f"version {live} serves on")
            work.details["checks"] = Verification(version, tuple(checks)).to_json()["checks"]
            _keep(desk, version)
        except BaseException:
            _take_back(desk, version)
            raise
        finally:
            tell(Verification(version, tuple(checks)))
    return Verification(version, tuple(checks))


def _static(desk: Desk, version: int, live: int, *, new_thresholds: bool) -> Sequence[Check]:
    desk.on_step(f"verify {version}: its files")
    needed = {server.model_file() for server in desk.servers}
    files = [file for file in desk.folder.model_files(version) if file.name in needed]
    missing = needed - {file.name for file in files}
    checks = [Check(f"{name}: file", "missing", "there: the servers read it", False) for name in sorted(missing)]
    return [*checks, *check_files(files, desk.folder.known_manifests(live), new_thresholds=new_thresholds)]


def _tried(desk: Desk, server: ServerControl, version: int, trial: Trial) -> Sequence[Check]:
    name = contract.pinned(str(version)).name
    where = f"{server.address}: " if len(desk.servers) > 1 else ""
    try:
        desk.on_step(f"verify {version}: load it beside the live one, {server.address}")
        served = server.served()
        if not served.by_name:  # align() saw to it; a candidate would answer everybody as soon as it is loaded
            raise VersionRefused(f"{server.address} serves the newest version that is loaded, whichever that is")
        server.load_beside(sorted({*served.loaded, version}))
        desk.on_step(f"verify {version}: load its ensemble, {server.address}")
        if version not in server.served().pinned:
            server.load_pinned(version)
        desk.on_step(f"verify {version}: probe, {server.address}")
        server.probe(name)
    except VersionRefused as refusal:
        return [Check(f"{where}loads and answers", str(refusal), "yes", False)]
    desk.on_step(f"verify {version}: trial, {server.address}")
    manifest = desk.folder.manifests(version)[server.model_file()]
    found = trial(Candidate(server.address, version, desk.live(), manifest))
    loads = Check(f"{where}loads and answers", "yes", "yes", True)
    return [loads, *(Check(f"{where}{check.what}", check.found, check.allowed, check.passed) for check in found)]


def _keep(desk: Desk, version: int) -> None:
    """From the servers' memory into the files."""
    desk.on_step(f"verify {version}: have the files load it")
    desk.folder.set_loaded(sorted({*(desk.folder.loaded() or ()), version}))
    desk.on_step(f"verify {version}: give it a name")
    desk.folder.add_pinned(version)
    for server in desk.servers:
        desk.on_step(f"verify {version}: load it from the files, {server.address}")
        server.load(contract.UNET.name)
        server.load(contract.pinned(str(version)).name)
    desk.align()


def _take_back(desk: Desk, version: int) -> None:
    """Files and servers let go of the candidate; a server that died of it has done so itself."""
    take_away(desk.folder, version)
    try:
        desk.align()
    except ServerError as error:
        log.warning("a server is not in line with the files yet, the next command does it: %s", error)


def _word(check: Check) -> str:
    return "ok" if check.passed else "FAILED"
