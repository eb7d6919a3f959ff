"""Keeps warnings and logs of pydicom and Pillow inside intake: what they tell is harmless, or becomes our error."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

_LOGGERS: Final = ("pydicom", "openjpeg")
"""They log what they then raise, with a traceback and with values of the file."""


@dataclass(slots=True)
class _WarningGate:
    """Shuts those warnings off while at least one thread is inside.

    :func:`warnings.catch_warnings` saves and restores a list that the whole process shares: overlapping threads would
    restore it in the wrong order and leave it changed for good. Here the first thread in saves it, the last one out
    restores.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    inside: int = 0
    saved: warnings.catch_warnings[None] | None = None

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.saved = warnings.catch_warnings()
                self.saved.__enter__()
                # Not narrowed to a module: the libraries attribute their warnings to their callers.
                for category in (UserWarning, RuntimeWarning):
                    warnings.simplefilter("ignore", category)
                _let_logs_out(False)

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and self.saved is not None:
                self.saved.__exit__(None, None, None)
                self.saved = None
                _let_logs_out(True)


def _let_logs_out(wanted: bool) -> None:
    for name in _LOGGERS:
        logging.getLogger(name).propagate = wanted


_GATE = _WarningGate()  # the one global of intake, because the list of warning filters is one too


@contextmanager
def quiet() -> Iterator[None]:
    """While inside, pydicom and Pillow neither warn nor log. Any number of threads may be inside at once."""
    _GATE.enter()
    try:
        yield
    finally:
        _GATE.leave()
