"""A path -> the regular files of a study: a folder, a zip file, a DICOMDIR or a single file."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Final

from groundglass.errors import UnreadableFile
from groundglass_client.intake.dicomdir import DICOMDIR, referenced_names
from groundglass_client.intake.slices import FoundFile

MAX_UNPACKED_BYTES: Final = 16 << 30
"""What a zip file may unpack to: ten times a large CT study."""

MAX_ZIP_MEMBERS: Final = 200_000
_CHUNK_BYTES: Final = 1 << 20


@contextmanager
def study_files(path: Path) -> Iterator[list[FoundFile]]:
    """The files of the study at ``path``, sorted by name. A zip file is unpacked to a temporary folder while inside.

    A DICOMDIR stands for the files that it lists; a folder for everything below it, and for what its DICOMDIR lists. A
    listed file that is missing is among them: to read it fails. Raises UnreadableFile if the path does not exist, or
    if a zip file is damaged, encrypted, too large or holds names that lead outside.
    """
    if not path.exists():
        raise UnreadableFile(f"{path}: does not exist; a study is a folder, a zip file, a DICOMDIR or a DICOM file")
    if path.is_dir():
        yield _folder_files(path)
    elif path.name.upper() == DICOMDIR:
        yield _listed_files(path)
    elif zipfile.is_zipfile(path):
        with TemporaryDirectory(prefix="groundglass-") as folder:
            _unpack(path, Path(folder))
            yield _folder_files(Path(folder))
    else:
        yield [FoundFile(path, path.name)]


def _folder_files(folder: Path) -> list[FoundFile]:
    found = {path.relative_to(folder).as_posix(): path for path in _walk(folder)}
    if DICOMDIR in found:
        found |= {file.name: file.path for file in _listed_files(found[DICOMDIR])}
    return [FoundFile(found[name], name) for name in sorted(found)]


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder. Links to folders are followed, each folder is entered once."""
    entered: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        yield from (Path(parent, name) for name in names)


def _refuse_folder(error: OSError) -> None:
    raise UnreadableFile(f"{error.filename}: can't be listed ({error.strerror})") from error


def _listed_files(dicomdir: Path) -> list[FoundFile]:
    """The files that a DICOMDIR lists, in the spelling of the disk: media are copied with names in lower case."""
    on_disk = {path.relative_to(dicomdir.parent).as_posix().lower(): path for path in _walk(dicomdir.parent)}
    found = []
    for name in sorted(set(referenced_names(dicomdir))):
        path = on_disk.get(name.lower(), dicomdir.parent / name)
        found.append(FoundFile(path, path.relative_to(dicomdir.parent).as_posix()))
    return found


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            _require_sane(archive, members)
            budget = MAX_UNPACKED_BYTES
            for member in members:
                budget -= _unpack_member(opened, member, folder / member.filename, budget)
    except UnreadableFile:
        raise
    # zipfile raises BadZipFile, RuntimeError (encrypted), NotImplementedError (method), zlib.error, EOFError, OSError.
    except Exception as error:
        raise UnreadableFile(f"{archive.name}: can't be unpacked ({error})") from error


def _require_sane(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MAX_ZIP_MEMBERS:
        raise UnreadableFile(f"{archive.name}: holds {len(members)} files; up to {MAX_ZIP_MEMBERS} are unpacked")
    for member in members:
        name = PurePosixPath(member.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in member.filename or ":" in name.parts[0]:
            raise UnreadableFile(f"{archive.name}: holds a name that leads outside of it: {member.filename!r}")


def _unpack_member(opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, budget: int) -> int:
    """Write one member and return its size in bytes. The declared size is not trusted: what comes out is counted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with opened.open(member) as source, target.open("wb") as sink:
        while chunk := source.read(_CHUNK_BYTES):
            written += len(chunk)
            if written > min(budget, shutil.disk_usage(target.parent).free):
                raise UnreadableFile(
                    f"{opened.filename}: unpacks to more than {MAX_UNPACKED_BYTES} bytes or than the disk holds"
                )
            sink.write(chunk)
    return written
