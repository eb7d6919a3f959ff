"""Stage and retire: a version's files come into the repository, and a version goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from groundglass import contract
from groundglass.errors import ServerError, VersionRefused
from groundglass.manifest import manifest_path
from groundglass_ensemble.versions.checks import check_files, require
from groundglass_ensemble.versions.control import ServerControl
from groundglass_ensemble.versions.desk import RETIRE, STAGE, Desk, log, take_away

QUIET_S: Final = 2.0
"""A version that got no request for so long is taken for unused."""

_POLL_S: Final = 0.2


def stage(
    desk: Desk,
    files: Sequence[Path],
    *,
    version: int | None = None,
    beside: Sequence[Path] = (),
    new_thresholds: bool = False,
) -> int:
    """Nothing -> staged: copy model ``files``, each with its manifest, into a new version; returns its number.

    The files have the names that a config of ``unet`` asks for (``model.onnx``, ``model.plan``). ``beside`` are files
    that go with them, such as golden answers. Triton does not load the version yet, also when it restarts. Raises
    VersionRefused for files that can't become a version, with the reason; RepositoryError when they can't be copied.
    """
    with desk.operation(STAGE, desk.free_version if version is None else version) as work:
        if work.version in desk.folder.versions():
            raise VersionRefused(
                f"version {work.version} is there already: a version is never replaced, take a new number"
            )
        known = desk.folder.file_names()
        for file in files:
            if file.name not in known:
                raise VersionRefused(f"{file}: a version consists of {' or '.join(sorted(known))}, by that name")
            if not file.is_file():
                raise VersionRefused(f"{file}: no such file")
        live = desk.folder.known_manifests(desk.live())
        require(work.version, list(check_files(files, live, new_thresholds=new_thresholds)), "nothing was copied")
        desk.on_step(f"stage {work.version}: copy")
        whole = (*files, *map(manifest_path, files), *beside)
        desk.folder.add_version(work.version, {file.name: file for file in whole})
        work.digests.update(desk.folder.digests(work.version))
    return work.version


def retire(desk: Desk, version: int, *, delete: bool = False, drain_s: float = 60.0) -> None:
    """Staged, verified -> retired: the servers let go of a version; with ``delete`` its files go too.

    Waits for up to ``drain_s`` seconds until no study is asking for it any more; a study that still does is computed
    again on the live version by its client. Raises VersionRefused for the live version.
    """
    with desk.operation(RETIRE, version, delete=delete) as work:
        if version not in desk.folder.versions():
            raise VersionRefused(f"there is no version {version}: {_listed(desk)}")
        if version == desk.folder.live() or desk.folder.live() is None:
            raise VersionRefused(f"version {version} is live: promote another one first")
        work.digests.update(desk.folder.digests(version))
        desk.on_step(f"retire {version}: drain")
        for server in desk.servers:
            _drain(server, version, drain_s)
        desk.on_step(f"retire {version}: take away its ensemble")
        take_away(desk.folder, version)
        desk.on_step(f"retire {version}: unload")
        desk.align()
        if delete:
            desk.on_step(f"retire {version}: delete")
            desk.folder.remove_version(version)


def _listed(desk: Desk) -> str:
    return f"{desk.folder.path} holds {', '.join(map(str, desk.folder.versions())) or 'none'}"


def _drain(server: ServerControl, version: int, drain_s: float) -> None:
    """Wait until nobody asks ``server`` for a version by name any more."""
    name = contract.pinned(str(version)).name
    began = last_change = time.monotonic()
    seen = -1
    while time.monotonic() - began < drain_s:
        try:
            if version not in server.served().pinned:
                return
            asked = server.tally(name).succeeded
        except ServerError as error:
            log.warning("version %d is not waited for: %s", version, error)
            return
        if asked != seen:
            seen, last_change = asked, time.monotonic()
        elif time.monotonic() - last_change >= QUIET_S:
            return
        time.sleep(_POLL_S)
    log.warning(
        "version %d at %s is still asked for after %g s; its studies go to the live version",
        version,
        server.address,
        drain_s,
    )
