"""The choice of a version: which version of the network answers a study, all of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from groundglass import contract
from groundglass.contract import ModelSpec
from groundglass.errors import VersionGone
from groundglass.study import Study
from groundglass_client.settings import SessionSettings
from groundglass_client.transport import ServedScan

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """The version that a study is sent to.

    ``by_name``: whatever is promoted meanwhile, this version answers or nobody does. Otherwise it is the version that
    is live, and whether it still is at the study's end must be asked. ``candidate``: a canary's, so that another
    version answers when this one does not.
    """

    version: str
    by_name: bool
    candidate: bool = False

    @property
    def model(self) -> ModelSpec:
        """The ensemble to send to."""
        return contract.pinned(self.version) if self.by_name else contract.CT_SCAN

    @property
    def live(self) -> str | None:
        """The version that must be live where a request goes; None when it asks for its version by name."""
        return None if self.by_name else self.version


def choose(served: ServedScan, settings: SessionSettings, study: Study, *, canary: bool) -> Choice:
    """The version that answers ``study``: the one that was asked for, the canary's, or the live one.

    Without ``canary`` the settings' canary is left out. Raises VersionGone when the version that was asked for can't
    be.
    """
    if settings.version is not None:
        return _asked_for(settings.version, served)
    if canary and (candidate := _candidate(served, settings, study)):
        return candidate
    return Choice(served.model_version, by_name=served.model_version in served.pinned)


def _asked_for(version: str, served: ServedScan) -> Choice:
    if version in served.pinned:
        return Choice(version, by_name=True)
    raise VersionGone(
        f"model version {version} can't be asked for by name: version {served.model_version} is live, and "
        f"{_versions(served.pinned)} can be asked for"
    )


def _candidate(served: ServedScan, settings: SessionSettings, study: Study) -> Choice | None:
    canary = settings.canary
    if canary is None or canary.version == served.model_version or not canary.takes(study):
        return None
    if canary.version in served.pinned:
        return Choice(canary.version, by_name=True, candidate=True)
    log.warning(
        "canary version %s can't be asked for by name (%s can): the study goes to version %s, which is live",
        *(canary.version, _versions(served.pinned), served.model_version),
    )
    return None


def _versions(versions: frozenset[str]) -> str:
    if not versions:
        return "no version"
    named = sorted(versions, key=int)
    return f"version{'s' if len(named) > 1 else ''} {', '.join(named)}"
