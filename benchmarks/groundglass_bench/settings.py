"""The loads that scenarios state, one type for each kind, checked before anything is booted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, get_type_hints

from groundglass.contract import MAX_SCAN_SLICES
from groundglass.errors import SettingError
from groundglass_client.phantom import SYNTAXES

_MAY_BE_ZERO: Final = frozenset({"warm_up"})
_COUNTS_OF_SLICES: Final = ("slices", "studies_of")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """A load. Raises SettingError for a value of another type, for zero of anything that is counted, and for a duration
    that is not positive.
    """

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            _check(name, kind, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns(LoadSettings):
    """A load whose parts take turns.

    repetitions: rounds that count; the median is judged.
    warm_up: rounds before them that don't.
    """

    repetitions: int = 3
    warm_up: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency(Turns):
    """The served network from DICOM on disk, against its bare engine.

    slices, files: a study's length, and how many distinct files it repeats. syntax: of the phantom's files.
    probe_s: how long each way to run the bare engine is tried. bare_s: one turn of the best.
    warm_up: studies of at most 16 slices before all turns.
    """

    slices: int
    files: int = 100
    syntax: str = "explicit"
    probe_s: float = 5.0
    bare_s: float = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenDecode(Turns):
    """A study from disk against the same study decoded before. Fields as in :class:`Efficiency`."""

    slices: int
    files: int = 100
    syntax: str = "jpeg-lossless"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling(Turns):
    """A near-free network, slices already decoded: what is left is the way there and back."""

    slices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers(Turns):
    """Other ways to send the same slices.

    slices: of one turn of ours and of the pytriton function. message_slices: of the study in one message.
    blocking_slices: of one turn with a request for each slice. json_slices: as JSON over HTTP.
    served_slices, torch_slices: through the real network, served and in eager torch.
    masks: everybody asks for the masks.
    """

    slices: int
    message_slices: int
    blocking_slices: int
    json_slices: int
    served_slices: int
    torch_slices: int
    masks: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSlices(Turns):
    """Studies of growing length, each sent by a client process of its own. studies_of: slices of each. slice_ms: what
    the network waits for each slice; without it the network is near-free.
    """

    studies_of: tuple[int, ...]
    slice_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak(LoadSettings):
    """Long studies in a row. ``settled`` is the study from which on memory must stay: caches are filled by then."""

    studies: int
    slices: int
    settled: int = 3

    def __post_init__(self) -> None:
        LoadSettings.__post_init__(self)
        if self.settled >= self.studies:
            raise SettingError(f"settled is {self.settled} of {self.studies} studies; expected fewer, to compare with")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingUsers(Turns):
    """Closed-loop users side by side. slices: of a user's studies. duration_s: of one repetition at one level."""

    users: tuple[int, ...]
    slices: int
    duration_s: float
    warm_up_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingReplicas(Turns):
    """A network that waits ``slice_ms`` for each slice, on one server and on two; one study over all of them."""

    slices: int
    slice_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop(Turns):
    """Arrivals that don't wait for answers, at shares of the capacity that a closed loop found.

    The network waits ``slice_ms`` for each slice in each of ``instances`` processes. slices: of one study.
    users: of the closed loop. offered: shares of its capacity, from the lightest, which counts as no load, to the
    heaviest, which is judged; each for ``duration_s``, after ``warm_up_s``.
    overload: share offered beyond it, for ``overload_s``.
    """

    slices: int
    slice_ms: float
    instances: int
    users: int
    offered: tuple[float, ...]
    duration_s: float
    warm_up_s: float = 1.0
    overload: float = 1.5
    overload_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Swaps(LoadSettings):
    """Versions that are swapped under load.

    clients: side by side; each sends studies of ``slices`` slices, and between two of them ``plain`` requests of one
    slice to ``ct_scan`` that nobody sends again. swaps: promotions and rollbacks in turns, ``pause_s`` apart.
    quiet_s: the same load without swaps, before them, after ``warm_up_s``.
    """

    clients: int
    slices: int
    plain: int
    swaps: int
    pause_s: float
    quiet_s: float
    warm_up_s: float = 1.0


SETTINGS: Final[Mapping[str, type[LoadSettings]]] = MappingProxyType(
    {
        "efficiency": Efficiency,
        "hidden_decode": HiddenDecode,
        "ceiling": Ceiling,
        "peers": Peers,
        "scaling_slices": ScalingSlices,
        "soak": Soak,
        "scaling_users": ScalingUsers,
        "scaling_replicas": ScalingReplicas,
        "open_loop": OpenLoop,
        "swaps": Swaps,
    }
)
"""By the kind's name in a scenario's file."""


def _check(name: str, kind: Any, value: Any) -> None:
    if kind in (tuple[int, ...], tuple[float, ...]):
        if not isinstance(value, tuple) or not value:
            raise SettingError(f"{name} is {value!r}; expected a list of at least one number")
        for entry in value:
            _check(name, kind.__args__[0], entry)
        return
    wanted = (int, float) if kind is float else (kind,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise SettingError(f"{name} is {value!r}; expected {kind.__name__}")
    if isinstance(value, int) and kind is int:
        _check_count(name, value)
    if kind is float and not value > 0:
        raise SettingError(f"{name} is {value:g}; expected more than 0")
    if name == "syntax" and value not in SYNTAXES:
        raise SettingError(f"syntax is {value!r}; known are {', '.join(SYNTAXES)}")


def _check_count(name: str, value: int) -> None:
    least = 0 if name in _MAY_BE_ZERO else 1
    if value < least:
        raise SettingError(f"{name} is {value}; expected at least {least}")
    if name in _COUNTS_OF_SLICES and value > MAX_SCAN_SLICES:
        raise SettingError(f"{name} is {value}; a scan has at most {MAX_SCAN_SLICES} slices")
