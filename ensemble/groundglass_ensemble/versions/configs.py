"""The three lines of a model repository that say which version answers, and their rewriting.

``unet``'s version policy says which versions are loaded, the step ``unet`` of ``ct_scan`` which of them is live, and an
ensemble ``ct_scan_v<N>`` gives each loaded version a name of its own. A text is edited where it stands, so that its
comments stay; when that does not give the intended config, the config is written anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from groundglass import contract
from groundglass.errors import RepositoryError
from groundglass_ensemble.repository import live_of

_POLICY: Final = re.compile(r"^version_policy\b[^{\n]*\{(?:[^{}\n]|\n|\{(?:[^{}]|\{[^{}]*\})*\})*\}\n?", re.MULTILINE)
_POLICY_COMMENT: Final = "# The versions that are loaded; `groundglass models` writes this line.\n"
_LIVE: Final = re.compile(r'(model_name:\s*"unet"\s+model_version:\s*)-?\d+')
_NAME: Final = re.compile(r'^name:\s*"ct_scan"', re.MULTILINE)
_COMMENTS: Final = re.compile(r"^\s*#.*\n", re.MULTILINE)


def with_policy(text: str, versions: Sequence[int]) -> str:
    """The config ``text`` of ``unet`` with exactly these versions loaded. Raises RepositoryError for no config."""
    line = f"version_policy {{ specific {{ versions: [ {', '.join(map(str, sorted(versions)))} ] }} }}\n"

    def edit(before: str) -> str:
        if _POLICY.search(before):
            return _POLICY.sub(line, before, count=1)
        return before.rstrip("\n") + "\n\n" + _POLICY_COMMENT + line

    def change(config: Any) -> None:
        config.version_policy.specific.versions[:] = sorted(versions)

    return _rewritten(text, edit, change)


def with_live(text: str, version: int) -> str:
    """The config ``text`` of ``ct_scan`` with ``version`` in its step ``unet``. Raises RepositoryError."""
    return _rewritten(text, lambda before: _LIVE.sub(rf"\g<1>{version}", before), lambda config: _pin(config, version))


def pinned_ensemble(text: str, version: int) -> str:
    """The config of ``ct_scan_v<version>``, made from that of ``ct_scan``. Raises RepositoryError."""
    name = contract.pinned(str(version)).name

    def change(config: Any) -> None:
        config.name = name
        _pin(config, version)

    header = f"# ct_scan with version {version} of unet, whichever is live. Written by `groundglass models`.\n"
    return header + _rewritten(
        _COMMENTS.sub("", text),
        lambda before: _LIVE.sub(rf"\g<1>{version}", _NAME.sub(f'name: "{name}"', before, count=1)),
        change,
    )


def parse(text: str) -> Any:
    """A ``ModelConfig``. Raises RepositoryError for a text that is none."""
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise RepositoryError(f"no Triton model config: {error}") from error


def _rewritten(text: str, edit: Callable[[str], str], change: Callable[[Any], None]) -> str:
    """``text`` after ``edit``, if that means what ``change`` makes of its config; else that config, uncommented."""
    wanted = parse(text)
    change(wanted)
    edited = edit(text)
    try:
        if parse(edited) == wanted:
            return edited
    except RepositoryError:
        pass
    return str(text_format.MessageToString(wanted))


def _pin(config: Any, version: int) -> None:
    live_of(config)  # raises without such a step
    for step in config.ensemble_scheduling.step:
        if step.model_name == contract.UNET.name:
            step.model_version = version


def text_of(config: Any) -> str:
    """A config as text."""
    return str(text_format.MessageToString(config))
