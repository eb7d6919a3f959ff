"""One request of shadow traffic, twice on its way: to the live version, and as a copy to the candidate."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundglass import contract
from groundglass_client.requests import Request, Tensors
from groundglass_client.shadow_scans import StudyKey


class Asked:
    """A request on its way, and the time to its end."""

    def __init__(self, future: Future[Tensors], began_s: float) -> None:
        """``began_s`` is when it was sent, by ``time.perf_counter``."""
        self.future = future
        self._began_s = began_s
        # Another future, not ``future`` itself: a callback may be called before an earlier one of another thread.
        self._timed: Future[float] = Future()
        future.add_done_callback(self._stop)

    @property
    def took_s(self) -> float:
        """Seconds from its sending to its end, once that is told."""
        return self._timed.result(timeout=0)

    @property
    def failed(self) -> bool:
        """Whether it has ended without an answer."""
        return self.future.done() and (self.future.cancelled() or self.future.exception() is not None)

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call once it has ended, in whatever thread notices it; at once if it has."""
        self._timed.add_done_callback(lambda timed: callback())

    def _stop(self, done: Future[Tensors]) -> None:
        self._timed.set_result(time.perf_counter() - self._began_s)


class Pair:
    """A request to the live version, and its copy. The rows of ``live_keys`` name their scans at the live version."""

    def __init__(self, request: Request, live: Asked, live_version: str) -> None:
        self.live = live
        self.live_version = live_version
        self.live_keys: list[StudyKey] = request.tensors[contract.STUDY.name].ravel().tolist()
        self.copy: Request | None = None
        self.candidate: Asked | None = None

    @property
    def hu(self) -> NDArray[np.int16]:
        """The slices, int16 (n, rows, columns), HU: the copy's own."""
        return self._tensor(contract.HU.name)

    @property
    def indices(self) -> NDArray[np.int32]:
        """The places of the slices in their scans, int32 (n,)."""
        column: NDArray[np.int32] = self._tensor(contract.SLICE_INDEX.name)[:, 0]
        return column

    @property
    def secrets(self) -> set[str]:
        """Every study key of both requests as text: what must never be told."""
        copied_keys = [] if self.copy is None else self.copy.tensors[contract.STUDY.name].ravel().tolist()
        return {
            key.decode(errors="replace") if isinstance(key, bytes) else str(key)
            for key in (*self.live_keys, *copied_keys)
        }

    def ask_candidate(self, candidate: Asked, when_done: Callable[[], None]) -> None:
        """The copy is on its way; ``when_done`` is called once both requests have ended.

        A live request that fails takes its copy with it: there is nothing to compare with.
        """
        self.candidate = candidate
        self.live.when_done(lambda: self._end_with_live(candidate))
        candidate.when_done(lambda: self.live.when_done(when_done))

    def _end_with_live(self, candidate: Asked) -> None:
        if self.live.failed:
            candidate.future.cancel()

    def _tensor(self, name: str) -> NDArray[Any]:
        if self.copy is None:
            raise ValueError("the request was not copied yet")
        return self.copy.tensors[name]


def copied(request: Request, version: str, candidate_keys: dict[StudyKey, bytes]) -> Request:
    """The same slices for ``version``, under other study keys, with every output wanted.

    All tensors are copied: the pixels lie in a buffer that is another request's once this one is answered.
    """
    model = contract.pinned(version)
    tensors = {spec.name: np.array(request.tensors[spec.name]) for spec in model.inputs}
    keys = tensors[contract.STUDY.name]
    for place, key in np.ndenumerate(keys):
        keys[place] = candidate_keys[key]
    return Request(model, tensors, model.outputs)
