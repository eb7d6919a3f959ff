"""What load a server is put under, as a value, and its form on locust's command line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Final, Literal, get_args

from groundglass.contract import MAX_SCAN_SLICES
from groundglass.errors import SettingError

Loop = Literal["closed", "open"]


@dataclass(frozen=True, slots=True)
class Load:
    """A load of whole studies.

    loop: "closed" has each user send a study, wait for its report, then send the next, so that a slow server is asked
        less. "open" has studies arrive at random times whatever the server does (a Poisson process), and counts latency
        from the arrival.
    users: a closed loop's users; an open loop's sources, which share ``rate_per_s``. Each has a connection of its own.
    rate_per_s: arrivals of an open loop, studies a second.
    slices: of a study, from 1 on; a pair is a range, of which each study draws its own.
    duration_s, warm_up_s: what is measured, and what comes before it and isn't.
    wait_s: what a closed loop's user waits after a report.
    max_in_flight: studies of an open loop that may be unanswered at once; an arrival above them counts as a failure.
    seed: of arrivals and of the studies' sizes.
    masks: ask for the lesion masks (32 KiB a slice).
    shared_memory: leave slices where a server on this host reads them itself; one that can't gets them as bytes.
    expected_run: the longest run, in slices, that every verdict must have; None for that of the lesion sent.
    chunk_bytes, window: pixels of a request, in bytes, and requests in flight of one study.
    request_timeout_s, recovery_s, study_timeout_s: longest wait for an answer, longest outage to sit through, and the
        limit of a whole study.
    processes: that send, since one Python process may be slower than the server.
    """

    loop: Loop = "closed"
    users: int = 1
    rate_per_s: float | None = None
    slices: int | tuple[int, int] = 1000
    duration_s: float = 60.0
    warm_up_s: float = 0.0
    wait_s: float = 0.0
    max_in_flight: int = 64
    seed: int = 0
    masks: bool = False
    shared_memory: bool = True
    expected_run: int | None = None
    chunk_bytes: int = 4 << 20
    window: int = 4
    request_timeout_s: float = 60.0
    recovery_s: float = 10.0
    study_timeout_s: float = 300.0
    processes: int = 1

    def __post_init__(self) -> None:
        """Raise SettingError for a load that can't be made."""
        if self.loop not in get_args(Loop):
            raise SettingError(f"loop {self.loop!r}: expected closed or open")
        if self.loop == "open" and self.rate_per_s is None:
            raise SettingError("an open loop needs its rate, in studies a second")
        if self.loop == "closed" and self.rate_per_s is not None:
            raise SettingError("a rate is an open loop's: a closed loop goes as fast as its users are answered")
        if self.loop == "open" and self.wait_s:
            raise SettingError("a wait is a closed loop's: an open loop waits for nobody")
        for name, least in _LEAST.items():
            _at_least(name, getattr(self, name), least)
        for name in _MORE_THAN_ZERO:
            _more_than_zero(name, getattr(self, name))
        first, last = self.slice_range
        if not 1 <= first <= last <= MAX_SCAN_SLICES:
            raise SettingError(f"slices {format_slices(self.slices)}: a study has 1 to {MAX_SCAN_SLICES}")
        if self.processes > self.users:
            raise SettingError(f"{self.processes} processes for users {self.users}: each needs a user of its own")

    @property
    def slice_range(self) -> tuple[int, int]:
        """Slices of the smallest and of the largest study."""
        return (self.slices, self.slices) if isinstance(self.slices, int) else self.slices


_LEAST: Final = {
    "users": 1,
    "warm_up_s": 0,
    "wait_s": 0,
    "max_in_flight": 1,
    "seed": 0,
    "expected_run": 0,
    "chunk_bytes": 1,
    "window": 1,
    "processes": 1,
}
_MORE_THAN_ZERO: Final = ("rate_per_s", "duration_s", "request_timeout_s", "recovery_s", "study_timeout_s")


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and not least <= value < math.inf:
        raise SettingError(f"{name} {value}: expected {least} or more")


def _more_than_zero(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise SettingError(f"{name} {value}: expected more than 0")


@dataclass(frozen=True, slots=True)
class Option:
    """One field of :class:`Load` as an option of the locustfile. ``kind`` is what the command line makes of a word."""

    field: str
    kind: type
    help: str

    @property
    def flag(self) -> str:
        """As it is typed."""
        return "--" + self.field.removesuffix("_per_s").replace("_", "-")

    @property
    def default(self) -> Any:
        """Of the command line: text for slices, and empty text for nothing, since the web form knows no None."""
        value = next(field.default for field in fields(Load) if field.name == self.field)
        return "" if value in (None, MISSING) else self.kind(value)


OPTIONS: Final = (
    Option("loop", str, "closed: each user sends its next study after a report. open: studies arrive at --rate."),
    Option("rate_per_s", str, "Open loop: studies a second, all users together."),
    Option("slices", str, "Slices of a study: a number, or a range such as 100..4000."),
    Option("warm_up_s", float, "Seconds that are not measured."),
    Option("wait_s", float, "Closed loop: seconds between a report and the next study."),
    Option("max_in_flight", int, "Open loop: unanswered studies at once; arrivals above them are failures."),
    Option("seed", int, "Of arrivals and sizes: same seed, same load."),
    Option("masks", bool, "Ask for the lesion masks too."),
    Option("shared_memory", bool, "Leave slices in memory that a server on this host reads itself."),
    Option("expected_run", str, "Longest run that is right, if it isn't that of the lesion sent."),
    Option("chunk_bytes", int, "Pixels of one request, in bytes."),
    Option("window", int, "Requests in flight of one study."),
    Option("request_timeout_s", float, "Longest wait for an answer."),
    Option("recovery_s", float, "Longest outage that a study sits through."),
    Option("study_timeout_s", float, "Limit of a whole study."),
)


def parse_load(words: Mapping[str, Any], users: int, duration_s: float) -> Load:
    """The load that the locustfile's options ask for, by field. Raises SettingError."""
    values = {option.field: words[option.field] for option in OPTIONS}
    values["slices"] = parse_slices(str(values["slices"]))
    values["rate_per_s"] = _number("rate", values["rate_per_s"], float)
    values["expected_run"] = _number("expected run", values["expected_run"], int)
    return Load(**values, users=users, duration_s=duration_s)


def arguments(load: Load) -> list[str]:
    """The locustfile's options for ``load``: the inverse of :func:`parse_load`."""
    found = []
    for option in OPTIONS:
        value = getattr(load, option.field)
        if option.kind is bool:
            found.append(option.flag if value else option.flag.replace("--", "--no-"))
        elif value is not None:
            found += [option.flag, format_slices(value) if option.field == "slices" else str(value)]
    return found


def parse_slices(text: str) -> int | tuple[int, int]:
    """``"1000"`` as 1000, ``"100..4000"`` as (100, 4000). Raises SettingError for anything else."""
    match = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", text.strip())
    if match is None:
        raise SettingError(f"slices {text!r}: expected a number, or a range such as 100..4000")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def format_slices(slices: int | tuple[int, int]) -> str:
    """The inverse of :func:`parse_slices`."""
    return str(slices) if isinstance(slices, int) else "..".join(map(str, slices))


def _number(what: str, text: Any, kind: type) -> Any:
    try:
        return kind(text) if str(text).strip() else None
    except ValueError:
        raise SettingError(f"{what} {text!r}: expected a number") from None
