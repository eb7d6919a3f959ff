"""The index of a DICOM medium: which files a DICOMDIR lists (PS3.3 annex F)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pydicom

from groundglass.errors import UnreadableFile
from groundglass_client.intake.quiet import quiet

DICOMDIR: Final = "DICOMDIR"


def referenced_names(dicomdir: Path) -> list[str]:
    """The paths, relative to its own folder, of the files that a DICOMDIR lists.

    Raises UnreadableFile if it is broken, or lists a path that leads outside of its folder.
    """
    try:
        with quiet():
            index = pydicom.dcmread(dicomdir, specific_tags=["DirectoryRecordSequence"])
            ids = [record.get("ReferencedFileID") for record in index.DirectoryRecordSequence]
    except Exception as error:  # pydicom raises nearly anything on broken input
        raise UnreadableFile(f"{dicomdir.name}: is no readable DICOMDIR ({type(error).__name__})") from error
    names = ["/".join([part] if isinstance(part, str) else part) for part in ids if part]
    for name in names:
        if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
            raise UnreadableFile(f"{dicomdir.name}: lists a file outside of its folder: {name!r}")
    return names
