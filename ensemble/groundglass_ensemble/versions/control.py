"""The server side: what a Triton serves now, and the calls that make it serve something else.

gRPC only: over HTTP a load keeps the server's thread for as long as it takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TypeVar

import tritonclient.grpc as triton
from google.protobuf import json_format
from tritonclient.utils import InferenceServerException

from groundglass import contract
from groundglass.errors import ServerRefused, ServerUnreachable, VersionRefused
from groundglass.tls import TlsSettings, tls_failure
from groundglass_ensemble.probe import probe_inference
from groundglass_ensemble.repository import live_of
from groundglass_ensemble.versions import configs

CALL_TIMEOUT_S: Final = 10.0
LOAD_TIMEOUT_S: Final = 600.0
"""A load returns when the model is ready and warm: a TensorRT plan of 64 slices a batch takes its time."""

_READY: Final = "READY"
_GONE: Final = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN"})
_NO_CONTROL: Final = re.compile(r"load / unload is not allowed", re.IGNORECASE)
_RESTRICTED: Final = re.compile(r"protocol is restricted, expecting header '(?P<header>[^']+)'", re.IGNORECASE)
_LOAD_FAILED: Final = re.compile(r"version (?P<version>\d+) is at \w+ state: (?P<reason>[^;]*)")

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Served:
    """What a server serves: the live version (``ct_scan``'s), the versions of ``unet`` that are loaded, and those that
    an ensemble of their own answers.

    ``live`` is None where no ``ct_scan`` is ready. ``by_name``: ``ct_scan`` names that version; otherwise it takes the
    newest that is loaded, and a version that is loaded beside it would be live at once.
    """

    triton: str
    live: int | None
    loaded: tuple[int, ...]
    pinned: tuple[int, ...]
    by_name: bool


@dataclass(frozen=True, slots=True)
class Tally:
    """Inferences of one model since it was loaded."""

    succeeded: int
    failed: int


class ServerControl:
    """One Triton with ``--model-control-mode=explicit``. Close it, or use it as a context manager.

    Raises ServerUnreachable, and ServerRefused when the server says no.
    """

    def __init__(
        self, address: str, headers: Mapping[str, str] | None = None, *, tls: TlsSettings | None = None
    ) -> None:
        """``headers`` go with every call: Triton may ask for a key before it loads anything
        (``--grpc-restricted-protocol``). The connection is plain without ``tls``.
        """
        self.address = address
        self._headers = dict(headers or {})
        self._tls = tls
        self._client = triton.InferenceServerClient(address, **({} if tls is None else tls.client_options()))

    def __enter__(self) -> ServerControl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def served(self) -> Served:
        """What it serves now."""
        index = self._asked(self._client.get_model_repository_index).models
        ready = {(model.name, model.version) for model in index if model.state == _READY}
        loaded = sorted(int(version) for name, version in ready if name == contract.UNET.name)
        numbers = (name.removeprefix(contract.PIN_PREFIX) for name, _ in ready if name.startswith(contract.PIN_PREFIX))
        named: int | None = None
        if any(name == contract.CT_SCAN.name for name, _ in ready):
            named = live_of(self._config(contract.CT_SCAN.name))
        return Served(
            triton=self._asked(self._client.get_server_metadata).version,
            live=max(loaded, default=None) if named == contract.NEWEST else named,
            loaded=tuple(loaded),
            pinned=tuple(sorted(int(one) for one in numbers if one.isdecimal())),
            by_name=named not in (None, contract.NEWEST),
        )

    def model_file(self) -> str:
        """The name of the file that ``unet``'s versions are read from here."""
        return str(self._config(contract.UNET.name).default_model_filename)

    def load(self, model: str) -> None:
        """Load a model from the repository, or again; returns once it is ready. What served before serves on."""
        self._load(model)

    def unload(self, model: str) -> None:
        """Take a model away; requests in progress are answered."""
        self._asked(self._client.unload_model, model)

    def load_beside(self, versions: Sequence[int]) -> None:
        """Have these versions of ``unet`` loaded, in this server's memory only: a restart forgets it.

        Raises VersionRefused, with the reason, when one of them does not load; the others serve on.
        """
        config = self._config(contract.UNET.name)
        config.version_policy.specific.versions[:] = sorted(versions)
        self._load(contract.UNET.name, config=_json(config))

    def load_pinned(self, version: int) -> None:
        """Give a version an ensemble of its own, in this server's memory only."""
        config = self._config(contract.CT_SCAN.name)
        text = configs.pinned_ensemble(configs.text_of(config), version)
        # A model that isn't in the repository comes with its files, and must have one.
        self._load(
            contract.pinned(str(version)).name, config=_json(configs.parse(text)), files={"file:1/ensemble": b" "}
        )

    def probe(self, model: str = contract.CT_SCAN.name) -> None:
        """One empty slice through ``model``. Raises VersionRefused when it isn't answered."""
        try:
            probe_inference(self._client, CALL_TIMEOUT_S * 6, model)
        except InferenceServerException as error:
            raise VersionRefused(f"{model} at {self.address} does not answer: {_one_line(error)}") from error

    def tally(self, model: str) -> Tally:
        """How many inferences of a model went well and failed so far."""
        found = self._asked(self._client.get_inference_statistics, model).model_stats
        stats = [item.inference_stats for item in found]
        return Tally(sum(item.success.count for item in stats), sum(item.fail.count for item in stats))

    def _config(self, model: str) -> Any:
        return self._asked(self._client.get_model_config, model).config

    def _load(self, model: str, **more: Any) -> None:
        try:
            self._client.load_model(model, headers=self._headers, client_timeout=LOAD_TIMEOUT_S, **more)
        except InferenceServerException as error:
            said = error.message() or ""
            failed = _LOAD_FAILED.search(said)
            if failed:
                reason = (
                    failed["reason"].strip().splitlines()[0].removeprefix("Internal: ").removeprefix("RuntimeError: ")
                )
                raise VersionRefused(
                    f"version {failed['version']} of {model} does not load at {self.address}: {reason}"
                ) from error
            raise self._translated(error, model) from error

    def _asked(self, question: Callable[..., _Answer], *arguments: Any) -> _Answer:
        try:
            return question(*arguments, headers=self._headers, client_timeout=CALL_TIMEOUT_S)
        except InferenceServerException as error:
            raise self._translated(error, " ".join(map(str, arguments))) from error

    def _translated(self, error: InferenceServerException, about: str) -> Exception:
        said = _one_line(error)
        if _NO_CONTROL.search(said):
            return ServerRefused(
                f"{self.address} does not let its models be loaded: start it with --model-control-mode=explicit and "
                "--load-model=* (`groundglass serve --control explicit`)"
            )
        restricted = _RESTRICTED.search(said)
        if restricted:
            return ServerRefused(
                f"{self.address} asks for a key before its models are loaded: --control-header "
                f"{restricted['header']}=VALUE, with the value that it was started with"
            )
        failed = tls_failure(self.address, said, self._tls)
        if failed is not None:
            return failed
        code = str(error.status()).removeprefix("StatusCode.")
        kind = ServerUnreachable if code in _GONE else ServerRefused
        return kind(f"{about or 'server'} at {self.address}: {said} ({code})")


def _json(config: Any) -> str:
    return json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True))


def _one_line(error: InferenceServerException) -> str:
    return next(iter((error.message() or str(error)).strip().splitlines()), "no reason given")
