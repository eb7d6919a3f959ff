"""The folder side: which versions a repository holds, which of them its configs load, and which is live.

Whatever is written here is written beside and renamed, in an order in which every state between loads: the version
policy names a version before an ensemble asks for it, and an ensemble is gone before the policy drops its version.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from groundglass import contract
from groundglass.errors import RepositoryError, VersionRefused
from groundglass.manifest import Manifest, file_digest, manifest_path, read_manifest
from groundglass.publish import published
from groundglass_ensemble.repository import PRODUCTION, live_of, policy_of, read_config
from groundglass_ensemble.versions import configs

LOCK: Final = "versions.lock"
BUILDING: Final = "building"
"""Folder inside a model's folder for what is not whole yet. Triton reads only versions there, and takes any folder at
the root for a model."""


class VersionFolder:
    """A model repository on a disk of this machine, mounted or not. Raises RepositoryError for anything else."""

    def __init__(self, path: Path) -> None:
        if not (path / contract.UNET.name).is_dir() or not (path / contract.CT_SCAN.name).is_dir():
            raise RepositoryError(
                f"{path} is no model repository of ours: it needs {contract.UNET.name}/ and {contract.CT_SCAN.name}/"
            )
        self.path = path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One command at a time. The lock goes with its process. Raises VersionRefused when another one holds it."""
        file = self.path / LOCK
        try:
            stream = file.open("a+")
        except OSError as error:
            raise RepositoryError(f"{file} can't be written: {error.strerror}") from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                stream.seek(0)
                holder = stream.read().strip() or "unknown"
                raise VersionRefused(
                    f"{self.path}: another command works on its versions ({holder}): wait for it"
                ) from None
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            stream.flush()
            yield

    def versions(self) -> tuple[int, ...]:
        """The versions of ``unet`` that have a folder, lowest first."""
        folder = self.path / contract.UNET.name
        return tuple(sorted(int(item.name) for item in folder.iterdir() if item.is_dir() and item.name.isdecimal()))

    def version_path(self, version: int) -> Path:
        """Where a version's files lie."""
        return self.path / contract.UNET.name / str(version)

    def loaded(self) -> tuple[int, ...] | None:
        """The versions that the configs of ``unet`` load; None when one of them leaves it to Triton.

        Configs that differ, as a crash between two of them leaves them, load what any of them names.
        """
        policies = [policy_of(config) for config in self._configs(contract.UNET.name)]
        if any(policy is None for policy in policies):
            return None
        return tuple(sorted({version for policy in policies for version in policy or ()}))

    def agreed(self) -> bool:
        """Whether all configs of ``unet``, and all of ``ct_scan``, say the same."""
        policies = {policy_of(config) for config in self._configs(contract.UNET.name)}
        lives = {live_of(config) for config in self._configs(contract.CT_SCAN.name)}
        return len(policies) == 1 and len(lives) == 1

    def live(self) -> int | None:
        """The version that ``ct_scan`` names; None when it takes the newest that is loaded."""
        found = live_of(self._configs(contract.CT_SCAN.name)[0])
        return None if found == contract.NEWEST else found

    def pinned(self) -> tuple[int, ...]:
        """The versions that have an ensemble of their own."""
        names = (item.name for item in self.path.glob(f"{contract.PIN_PREFIX}*") if item.is_dir())
        numbers = (name.removeprefix(contract.PIN_PREFIX) for name in names)
        return tuple(sorted(int(number) for number in numbers if number.isdecimal()))

    def model_files(self, version: int) -> tuple[Path, ...]:
        """The files of a version that one of ``unet``'s configs asks for, and that are there."""
        names = {config.default_model_filename for config in self._configs(contract.UNET.name)}
        files = (self.version_path(version) / name for name in sorted(names))
        return tuple(file for file in files if file.is_file())

    def digests(self, version: int) -> dict[str, str]:
        """SHA-256 of a version's model files, by name."""
        return {file.name: file_digest(file) for file in self.model_files(version)}

    def manifests(self, version: int) -> dict[str, Manifest]:
        """The manifests of a version's model files, by the file's name. Raises RepositoryError where one is missing."""
        return {file.name: read_manifest(file) for file in self.model_files(version)}

    def known_manifests(self, version: int) -> dict[str, Manifest]:
        """Those manifests of a version that are there and readable."""
        found = {}
        for file in self.model_files(version):
            if manifest_path(file).exists():
                try:
                    found[file.name] = read_manifest(file)
                except RepositoryError:
                    continue
        return found

    def file_names(self) -> frozenset[str]:
        """The names of model files that the configs of ``unet`` ask for."""
        return frozenset(config.default_model_filename for config in self._configs(contract.UNET.name))

    def set_loaded(self, versions: Sequence[int]) -> None:
        """Have every config of ``unet`` load exactly these versions."""
        self._rewrite(contract.UNET.name, lambda text: configs.with_policy(text, versions))

    def set_live(self, version: int) -> None:
        """Have every config of ``ct_scan`` name this version."""
        self._rewrite(contract.CT_SCAN.name, lambda text: configs.with_live(text, version))

    def add_pinned(self, version: int) -> None:
        """Give a version an ensemble of its own; done already is well."""
        target = self.path / contract.pinned(str(version)).name
        if target.exists():
            return
        source = self.path / contract.CT_SCAN.name
        with self._built(contract.CT_SCAN.name, target) as folder:
            (folder / "1").mkdir()
            # A folder under version control, or copied by a tool that leaves out empty ones, must keep its version.
            (folder / "1" / ".gitkeep").touch()
            for file in _config_files(source):
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                copy.write_text(configs.pinned_ensemble(file.read_text(), version))

    def remove_pinned(self, version: int) -> None:
        """Take a version's ensemble away; gone already is well."""
        self._remove(self.path / contract.pinned(str(version)).name, contract.CT_SCAN.name)

    def add_version(self, version: int, files: Mapping[str, Path]) -> None:
        """Copy ``files`` (name there: source) into a new version, which appears whole. Raises RepositoryError."""
        with self._built(contract.UNET.name, self.version_path(version)) as folder:
            for name, source in files.items():
                try:
                    shutil.copyfile(source, folder / name)
                except OSError as error:
                    raise RepositoryError(f"{source} can't be copied to {folder}: {error.strerror}") from error

    def remove_version(self, version: int) -> None:
        """Delete a version's files."""
        self._remove(self.version_path(version), contract.UNET.name)

    def remove_leavings(self) -> None:
        """Delete what commands that were killed had begun to build."""
        for model in (contract.UNET.name, contract.CT_SCAN.name):
            shutil.rmtree(self.path / model / BUILDING, ignore_errors=True)

    def touch(self, model: str) -> None:
        """Make Triton read a model's config again at its next load: it does so only for a file that is newer."""
        for file in _config_files(self.path / model):
            file.touch()

    def _configs(self, model: str) -> list[Any]:
        return [read_config(file) for file in _config_files(self.path / model)]

    def _rewrite(self, model: str, edit: Callable[[str], str]) -> None:
        for file in _config_files(self.path / model):
            before = file.read_text()
            after = edit(before)
            if after != before:
                with published(file) as beside:
                    beside.write_text(after)

    @contextmanager
    def _built(self, model: str, target: Path) -> Iterator[Path]:
        """A folder to fill; it takes the name ``target`` once the block ends well, with all its files on disk."""
        folder = self.path / model / BUILDING / f"{target.name}.{os.getpid()}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise RepositoryError(f"{folder} can't be made: {error.strerror}") from error
        try:
            yield folder
            for item in (*folder.rglob("*"), folder):
                _sync(item)
            folder.rename(target)
            _sync(target.parent)
        except OSError as error:
            raise RepositoryError(f"{target} can't be written: {error.strerror}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _remove_empty(folder.parent)

    def _remove(self, target: Path, model: str) -> None:
        """Rename away, then delete: nothing half deleted is ever seen under the name."""
        if not target.exists():
            return
        gone = self.path / model / BUILDING / f"{target.name}.{os.getpid()}.gone"
        gone.parent.mkdir(exist_ok=True)
        target.rename(gone)
        shutil.rmtree(gone)
        _remove_empty(gone.parent)


def _config_files(model: Path) -> list[Path]:
    """The production config and its variants. Raises RepositoryError without one."""
    files = [file for file in (model / PRODUCTION, *sorted((model / "configs").glob("*.pbtxt"))) if file.is_file()]
    if not files:
        raise RepositoryError(f"{model} has no {PRODUCTION}")
    return files


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # another one's work is in it, or it was never made
