"""What a runtime tells while it builds a plan: its messages, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

_LONGEST_MESSAGE: Final = 300


@dataclass(slots=True)
class BuildLog:
    """What a runtime said while it built: ``errors``, and ``layers``, the finished engine's, a line each."""

    errors: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def take(self, severity: str, message: str) -> None:
        """Sort one message in. The list of layers comes as one message, at the lowest severity."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)
        elif message.startswith("Layers:"):
            self.layers = [line for line in message.splitlines() if line.startswith("Name: ")]

    def complaint(self) -> str:
        """The first error, on one line."""
        text = " ".join(self.errors[0].split()) if self.errors else "it gave no reason"
        return text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 3] + "..."


class Phases:
    """Nested phases of a build as one share of the whole, 0..1, that never goes back.

    What ``report`` raises is kept for :meth:`raise_stopped`, and the build is told to stop: an exception can't cross
    the C++ in between.
    """

    def __init__(self, report: Callable[[str, float], None]) -> None:
        self._report = report
        self._open: list[tuple[str, int, int]] = []  # name, steps in all, steps done; outermost first
        self._share = 0.0
        self._stopped: BaseException | None = None

    def start(self, name: str, steps: int) -> None:
        """A phase begins inside the one that began last."""
        self._open.append((name, max(steps, 1), 0))

    def step(self, name: str, done: int) -> bool:
        """``done`` counts from zero: that step is over. False when the build shall stop."""
        self._open = [(known, steps, done + 1 if known == name else before) for known, steps, before in self._open]
        return self._tell(name)

    def finish(self, name: str) -> bool:
        """The phase is over, and a phase around it is one step further or will say so itself."""
        place = next((place for place, phase in enumerate(self._open) if phase[0] == name), None)
        if place is not None:
            self._open = self._open[:place]
        if not self._open:
            self._share = 1.0
        return self._tell(name)

    def raise_stopped(self) -> None:
        """Raise what the callback raised, if it did."""
        if self._stopped is not None:
            raise self._stopped

    def _tell(self, name: str) -> bool:
        if self._stopped is not None:
            return False
        share = 0.0
        for _, steps, done in reversed(self._open):
            share = min(1.0, (done + share) / steps)
        self._share = max(self._share, share)
        try:
            self._report(name, self._share)
        except BaseException as error:  # KeyboardInterrupt above all
            self._stopped = error
            return False
        return True
