"""The journal beside the models: who did what to which version, when, and why it was refused.

A line of JSON a record, in ``versions.jsonl`` at the root of the repository: Triton reloads a model in whose folder a
file has changed, and takes only folders for models. Every record is on disk before the step that it announces.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from groundglass.errors import RepositoryError

JOURNAL: Final = "versions.jsonl"

BEGUN: Final = "begun"
DONE: Final = "done"
REFUSED: Final = "refused"
UNDONE: Final = "undone"
"""Outcomes: announced; done; refused, with nothing changed; found half done after a crash, and taken back."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line: ``action`` on ``version`` by ``who`` at ``time`` (UTC, ISO 8601), and its ``outcome``.

    ``digests`` are the SHA-256 of the version's model files by name; ``reason`` says why not; ``details`` hold what the
    action was about: the versions ``from`` and ``to`` of a promotion, the figures of a verification.
    """

    action: str
    version: int
    outcome: str
    who: str
    time: str
    digests: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """The journal of one repository. Append-only; a reader sees whole records only."""

    def __init__(self, repository: Path, who: str | None = None) -> None:
        """``who`` signs new records; by default the user and the host."""
        self.path = repository / JOURNAL
        self._who = who or _user_and_host()

    def write(self, action: str, version: int, outcome: str, **more: Any) -> Record:
        """Append a record, on disk when this returns. Raises RepositoryError when it can't be written."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        record = Record(action, version, outcome, self._who, now, **more)
        line = json.dumps(asdict(record), ensure_ascii=False) + "\n"
        try:
            with self.path.open("ab") as stream:
                # One write: a crash leaves it whole or torn at the end, where the next record starts a new line.
                stream.write((line if _ends_whole(self.path) else "\n" + line).encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise RepositoryError(f"the journal {self.path} can't be written: {error.strerror}") from error
        return record

    def records(self) -> tuple[Record, ...]:
        """All records, oldest first; a line that a crash tore is left out. Raises RepositoryError."""
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return ()
        except (OSError, UnicodeDecodeError) as error:
            raise RepositoryError(f"the journal {self.path} can't be read: {error}") from error
        return tuple(record for line in lines if (record := _parsed(line)) is not None)

    def pending(self) -> Record | None:
        """What was begun last and has no outcome: its command was killed, or is still at work."""
        records = self.records()
        return records[-1] if records and records[-1].outcome == BEGUN else None

    def last_done(self, version: int, *actions: str) -> Record | None:
        """The latest of these actions that was done to ``version``; of any action when none is named."""
        for record in reversed(self.records()):
            if record.version == version and record.outcome == DONE and (not actions or record.action in actions):
                return record
        return None


def _parsed(line: str) -> Record | None:
    try:
        return Record(**json.loads(line))
    except (ValueError, TypeError):
        return None  # torn: its command died while it wrote, so what it announces never began


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as stream:
        if not stream.seek(0, os.SEEK_END):
            return True
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


def _user_and_host() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
