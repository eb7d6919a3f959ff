"""TensorRT's measurements of kernels, kept in a file between builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from groundglass.errors import ModelError
from groundglass.publish import published
from groundglass_export.tensorrt_runtime import TensorRt


class TimingCache:
    """The cache of one build. A file of another version or GPU is replaced by a new one.

    Raises ModelError for a file that can't be read or written. RTX measures nothing, and its file is left alone.
    """

    def __init__(self, runtime: TensorRt, config: Any, path: Path | None) -> None:
        self._path = None if runtime.is_rtx else path
        self._config = config
        if self._path is None:
            return
        try:
            known = self._path.read_bytes() if self._path.exists() else b""
        except OSError as error:
            raise ModelError(f"timing cache {self._path} can't be read: {error}") from error
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def store(self) -> None:
        """Write what is known now."""
        if self._path is None:
            return
        try:
            with published(self._path) as beside:
                beside.write_bytes(bytes(self._config.get_timing_cache().serialize()))
        except OSError as error:
            raise ModelError(f"timing cache {self._path} was not written: {error}") from error
