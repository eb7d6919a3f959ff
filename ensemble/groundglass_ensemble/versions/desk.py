"""Where a command works: one repository, its journal, the servers that serve it; and the order of what is done.

The files decide. A server is brought in line with them (:meth:`Desk.align`); a command that was killed is first settled
(:func:`settle`), so that every command starts from a repository and servers that agree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from groundglass import contract
from groundglass.errors import GroundglassError, ServerUnreachable, VersionRefused
from groundglass_ensemble.versions.control import Served, ServerControl
from groundglass_ensemble.versions.folder import VersionFolder
from groundglass_ensemble.versions.journal import BEGUN, DONE, REFUSED, UNDONE, Journal, Record

log = logging.getLogger(__name__)

ADOPT, STAGE, VERIFY, PROMOTE, ROLLBACK, RETIRE = "adopt", "stage", "verify", "promote", "rollback", "retire"


@dataclass(slots=True)
class Operation:
    """A command at work: what it puts here goes into the record of its end."""

    version: int
    digests: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Desk:
    """``servers`` all serve ``folder``; none is needed for what changes files only. ``on_step`` hears of each step
    before it happens.
    """

    folder: VersionFolder
    journal: Journal
    servers: Sequence[ServerControl] = ()
    on_step: Callable[[str], None] = lambda step: None

    @contextmanager
    def operation(self, action: str, version: int | Callable[[], int], **details: Any) -> Iterator[Operation]:
        """The frame of every transition: lock, settle, announce; then done, or refused with the reason.

        The block itself takes back what it did when it fails. ``version`` may depend on what settling leaves. The
        record holds, as ``from``, the version that was live before.
        """
        with self.folder.lock():
            settle(self)
            if action in (STAGE, VERIFY):
                self.adopt()
            version = version if isinstance(version, int) else version()
            details = {"from": self.folder.live(), **details}
            self.on_step(f"{action} {version}: announce")
            self.journal.write(action, version, BEGUN, details=details)
            work = Operation(version, details=dict(details))
            try:
                yield work
            except BaseException as error:
                reason = str(error) if isinstance(error, GroundglassError) else f"{type(error).__name__}: {error}"
                self.journal.write(action, version, REFUSED, reason=reason, digests=work.digests, details=work.details)
                raise
            self.on_step(f"{action} {version}: record")
            self.journal.write(action, version, DONE, digests=work.digests, details=work.details)

    def require_servers(self) -> None:
        """Raise VersionRefused where no server was given, ServerUnreachable for one that is away."""
        if not self.servers:
            raise VersionRefused("a server is needed for this: name it with --server")
        for server in self.servers:
            server.served()

    def live(self) -> int:
        """The live version by the files. Raises VersionRefused for a repository that was never adopted."""
        found = self.folder.live()
        if found is None:
            raise VersionRefused(f"{self.folder.path} names no live version yet: `groundglass models stage` does it")
        return found

    def free_version(self) -> int:
        """The next version number; none is ever given twice, also when its files are gone."""
        known = (*self.folder.versions(), *(record.version for record in self.journal.records()))
        return max(known, default=0) + 1

    def adopt(self) -> None:
        """Have a plain repository name its live version, so that a new one can come without being served at once.

        The live version is what the servers serve, or without one the newest in the folder.
        """
        folder = self.folder
        if folder.live() is not None and folder.loaded() is not None:
            return
        live = self._live_of_plain()
        log.info("%s names no version yet: %d is live from now on", folder.path, live)
        self.journal.write(ADOPT, live, BEGUN)
        self.on_step(f"adopt {live}: load it by name")
        folder.set_loaded([live])
        folder.add_pinned(live)
        self.on_step(f"adopt {live}: make it live by name")
        folder.set_live(live)
        self.align()
        self.journal.write(ADOPT, live, DONE, digests=folder.digests(live))

    def align(self) -> None:
        """Bring every server in line with the files. Never unloads ``unet`` or ``ct_scan``; what serves serves on until
        its successor is ready.
        """
        for server in self.servers:
            _align(self, server)

    def _live_of_plain(self) -> int:
        named = self.folder.live()
        serving = {served.live for server in self.servers if (served := server.served()).live is not None}
        if len(serving) > 1:
            raise VersionRefused(f"the servers serve versions {sorted(map(str, serving))}: make them serve one first")
        newest = max(self.folder.versions(), default=None)
        live = named or next(iter(serving), newest)
        if live is None or live not in self.folder.versions():
            raise VersionRefused(f"{self.folder.path} has no version of {contract.UNET.name} that could be live")
        return live


def settle(desk: Desk) -> None:
    """Take back, or complete, what a killed command left, and bring the servers in line with the files.

    A promotion that was not proved is taken back; a rollback and a retirement are completed, for both lead to what is
    known to work. Servers that are away are left: they read the files when they start.
    """
    desk.folder.remove_leavings()
    pending = desk.journal.pending()
    if pending is not None:
        log.warning(
            "%s of version %d was interrupted (%s, %s)", pending.action, pending.version, *(pending.who, pending.time)
        )
        desk.on_step(f"settle {pending.action} {pending.version}")
        _SETTLED[pending.action](desk, pending)
    _agree(desk.folder)
    for server in desk.servers:
        try:
            _align(desk, server)
        except ServerUnreachable as error:
            log.warning("a server is left as it is: %s", error)
    if pending is not None:
        outcome = UNDONE if pending.action in (PROMOTE, VERIFY) else DONE
        if pending.action == STAGE and pending.version not in desk.folder.versions():
            outcome = UNDONE
        digests = desk.folder.digests(pending.version) if outcome == DONE else {}
        reason = "its command was interrupted" if outcome == UNDONE else "completed after its command was interrupted"
        desk.journal.write(
            pending.action, pending.version, outcome, reason=reason, digests=digests, details=pending.details
        )


def _agree(folder: VersionFolder) -> None:
    """Make configs that differ say the same: all that any of them loads, and what the production config makes live."""
    loaded, live = folder.loaded(), folder.live()
    if folder.agreed() or loaded is None or live is None:
        return
    folder.set_loaded(loaded)
    folder.set_live(live)


def _settle_adoption(desk: Desk, record: Record) -> None:
    desk.folder.set_loaded([record.version])
    desk.folder.add_pinned(record.version)
    desk.folder.set_live(record.version)


def _settle_staging(desk: Desk, record: Record) -> None:
    """A version appears whole or not at all: there is nothing to do."""


def _settle_verification(desk: Desk, record: Record) -> None:
    take_away(desk.folder, record.version)


def _settle_promotion(desk: Desk, record: Record) -> None:
    desk.folder.set_live(int(record.details["from"]))


def _settle_rollback(desk: Desk, record: Record) -> None:
    desk.folder.set_live(record.version)


def _settle_retirement(desk: Desk, record: Record) -> None:
    take_away(desk.folder, record.version)
    if record.details.get("delete"):
        desk.folder.remove_version(record.version)


_SETTLED: dict[str, Callable[[Desk, Record], None]] = {
    ADOPT: _settle_adoption,
    STAGE: _settle_staging,
    VERIFY: _settle_verification,
    PROMOTE: _settle_promotion,
    ROLLBACK: _settle_rollback,
    RETIRE: _settle_retirement,
}


def take_away(folder: VersionFolder, version: int) -> None:
    """Have the files load a version no more; its own files stay. The live version can't be taken away."""
    if version == folder.live():
        return
    folder.remove_pinned(version)
    loaded = folder.loaded()
    if loaded is not None and version in loaded:
        folder.set_loaded([one for one in loaded if one != version])


def _align(desk: Desk, server: ServerControl) -> None:
    folder = desk.folder
    wanted, live = folder.loaded(), folder.live()
    if wanted is None or live is None:
        return  # a plain repository: Triton chooses
    served = server.served()
    for version in served.pinned:
        if version not in folder.pinned():
            server.unload(contract.pinned(str(version)).name)
    if served.loaded != wanted:
        desk.on_step(f"{server.address}: load versions {', '.join(map(str, wanted))}")
        folder.touch(contract.UNET.name)
        server.load(contract.UNET.name)
    for version in folder.pinned():
        if version not in served.pinned:
            server.load(contract.pinned(str(version)).name)
    if served.live != live or not served.by_name:
        desk.on_step(f"{server.address}: make version {live} live")
        folder.touch(contract.CT_SCAN.name)
        server.load(contract.CT_SCAN.name)


def lines_up(folder: VersionFolder, served: Served) -> bool:
    """Whether a server serves what the files say."""
    wanted = folder.loaded()
    if wanted is None or folder.live() is None:
        return True
    return served.by_name and (served.live, served.loaded, served.pinned) == (folder.live(), wanted, folder.pinned())
