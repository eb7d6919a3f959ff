"""Promote and roll back: another version becomes the live one.

Both versions stay loaded, so that either way is one line of ``ct_scan``'s config and the load of an ensemble, which
holds no weights: milliseconds, with nothing dropped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from groundglass import contract
from groundglass.errors import GroundglassError, ServerError, VersionRefused
from groundglass_ensemble.versions.control import ServerControl, Tally
from groundglass_ensemble.versions.desk import PROMOTE, ROLLBACK, VERIFY, Desk, log
from groundglass_ensemble.versions.journal import DONE

_POLL_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Watch:
    """How closely a new live version is watched before it is taken for good.

    seconds: how long. failure_share: share of the inferences that may fail in that time. Requests that clients got
    wrong count too: where more than half this share failed under the version before, twice what failed then may.
    """

    seconds: float = 10.0
    failure_share: float = 0.01


DEFAULT_WATCH: Final = Watch()


def promote(desk: Desk, version: int, watch: Watch = DEFAULT_WATCH) -> None:
    """Verified -> live; the version that was live becomes verified, and stays loaded for a rollback.

    Raises VersionRefused when the version was not verified, or was changed since; and, after the old version was made
    live again, when the new one does not answer or fails too often. No request is dropped either way.
    """
    with desk.operation(PROMOTE, version) as work:
        desk.require_servers()
        before = desk.live()
        work.digests.update(desk.folder.digests(version))
        _require_verified(desk, version)
        for server in desk.servers:
            desk.on_step(f"promote {version}: probe it, {server.address}")
            server.probe(contract.pinned(str(version)).name)
        if version == before:
            return  # a promotion that is told again
        allowed = {server.address: max(watch.failure_share, 2 * _failed_share(server)) for server in desk.servers}
        try:
            _make_live(desk, version, PROMOTE)
            _watch(desk, version, watch, allowed)
        except BaseException as error:
            _make_live_again(desk, before)
            if isinstance(error, GroundglassError):
                raise VersionRefused(f"version {version} was rolled back, {before} is live again: {error}") from error
            raise


def rollback(desk: Desk, to: int | None = None) -> int:
    """Live -> verified, and the version that was live before, or ``to``, becomes live again; returns its number.

    Nothing is verified: it worked before. It is live as soon as ``ct_scan`` is loaded; the probe comes after.

    Raises VersionRefused when there is no such version, or it is loaded no more.
    """
    with desk.operation(ROLLBACK, lambda: to or _rollback_target(desk)) as work:
        target = work.version
        desk.require_servers()
        if target not in (desk.folder.loaded() or ()):
            raise VersionRefused(f"version {target} is not loaded any more: verify it, then promote it")
        work.digests.update(desk.folder.digests(target))
        before = desk.live()
        for server in desk.servers:
            # No inference before the change: it would wait its turn behind the very load that is to be rescued.
            if target not in server.served().pinned:
                raise VersionRefused(f"{server.address} does not serve version {target}: verify it, then promote it")
        try:
            _make_live(desk, target, ROLLBACK)
        except BaseException:
            _make_live_again(desk, before)
            raise
    return target


def previous_version(desk: Desk) -> int | None:
    """The version that was live before the live one and is still loaded: a rollback would make it live."""
    live, loaded = desk.folder.live(), desk.folder.loaded() or ()
    for record in reversed(desk.journal.records()):
        if (record.version, record.outcome) != (live, DONE) or record.action not in (PROMOTE, ROLLBACK):
            continue
        before = record.details.get("from")
        if before not in (None, live):  # a promotion of what is live says nothing of what was before
            return int(before) if before in loaded else None
    return None


def is_verified(desk: Desk, version: int) -> bool:
    """Whether a version is loaded by the files, and passed its verification as it is now."""
    record = desk.journal.last_done(version, VERIFY)
    if record is None or version not in (desk.folder.loaded() or ()):
        return False
    return dict(record.digests) == desk.folder.digests(version)


def _rollback_target(desk: Desk) -> int:
    previous = previous_version(desk)
    if previous is None:
        raise VersionRefused(f"{desk.folder.path}: no version was live before that is still loaded; name one with --to")
    return previous


def _require_verified(desk: Desk, version: int) -> None:
    if version not in desk.folder.versions():
        raise VersionRefused(f"there is no version {version}: {desk.folder.path} holds {desk.folder.versions()}")
    if version != desk.folder.live() and not is_verified(desk, version):
        record = desk.journal.last_done(version, VERIFY)
        changed = record is not None and dict(record.digests) != desk.folder.digests(version)
        why = "its files changed since" if changed else "it was not verified"
        raise VersionRefused(f"version {version} can't be promoted, {why}: `groundglass models verify {version}` first")


def _make_live(desk: Desk, version: int, action: str) -> None:
    desk.on_step(f"{action} {version}: write")
    desk.folder.set_live(version)
    desk.on_step(f"{action} {version}: load")
    desk.align()
    for server in desk.servers:
        desk.on_step(f"{action} {version}: probe, {server.address}")
        found = server.served().live
        if found != version:
            raise VersionRefused(f"{server.address} serves version {found}, expected {version}")
        server.probe()


def _make_live_again(desk: Desk, version: int) -> None:
    """The way back, which must not hide the reason for it."""
    try:
        desk.folder.set_live(version)
        desk.align()
    except ServerError as error:
        log.warning("a server is not in line with the files yet, the next command does it: %s", error)


def _watch(desk: Desk, version: int, watch: Watch, allowed: Mapping[str, float]) -> None:
    """Raise VersionRefused once more than the ``allowed`` share of a server's inferences fails."""
    began = time.monotonic()
    before = {server.address: _tally(server, version) for server in desk.servers}
    desk.on_step(f"promote {version}: watch for {watch.seconds:g} s")
    while True:
        for server in desk.servers:
            server.probe()
            now, then = _tally(server, version), before[server.address]
            failed, answered = now.failed - then.failed, now.succeeded - then.succeeded
            if failed > allowed[server.address] * (failed + answered):
                raise VersionRefused(f"{failed} of {failed + answered} inferences failed at {server.address}")
        if time.monotonic() - began >= watch.seconds:
            return
        time.sleep(_POLL_S)


def _tally(server: ServerControl, version: int) -> Tally:
    """Of whole scans, by either name: a stage's own count misses what its backend answers later with an error."""
    found = [server.tally(name) for name in (contract.CT_SCAN.name, contract.pinned(str(version)).name)]
    return Tally(sum(item.succeeded for item in found), sum(item.failed for item in found))


def _failed_share(server: ServerControl) -> float:
    tally = server.tally(contract.CT_SCAN.name)
    return tally.failed / max(tally.failed + tally.succeeded, 1)
