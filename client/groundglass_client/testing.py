"""A server in memory, for tests of code that uses the client: it keeps the tensor contract and runs no network."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from groundglass import contract
from groundglass.errors import AggregationError, ServerRefused, VersionGone
from groundglass.finding import ScanRows
from groundglass_client.buffers import Buffers
from groundglass_client.requests import Request, Tensors
from groundglass_client.transport import ServedScan

MARK_FROM_HU: Final = 0
POSITIVE_FROM_PIXELS: Final = 64


class InMemoryTransport:
    """Marks every pixel of 0 HU or more, unless told otherwise; a slice is positive from 64 marked pixels on.

    Slices must divide 512: each pixel fills a square of the mask. Scans are kept for the life of the object.
    """

    def __init__(
        self,
        positive_run: int = contract.POSITIVE_RUN,
        *,
        live: str = "1",
        pinned: Collection[str] = (),
        mark_from_hu: Mapping[str, int] | None = None,
    ) -> None:
        """``positive_run`` consecutive positive slices make a scan positive.

        Version ``live`` answers ``ct_scan``, and those ``pinned`` can be asked for by name. A version marks pixels from
        0 HU on, or from what ``mark_from_hu`` says of it. All of them may change at any time: see :meth:`promote`,
        :meth:`pin` and :meth:`retire`.
        """
        self._positive_run = positive_run
        self._live = live
        self._pinned = frozenset(pinned)
        self._mark_from_hu = mark_from_hu or {}
        self._scans: dict[bytes, ScanRows] = {}
        self._one_at_a_time = threading.Lock()  # as the real aggregator, which has one instance
        self._buffers = Buffers(shared=False)

    def buffers(self) -> Buffers:
        """Memory of this process."""
        return self._buffers

    def describe(self, timeout_s: float) -> ServedScan:
        """The version that is live, and those that can be asked for by name."""
        with self._one_at_a_time:
            return ServedScan(self._live, self._positive_run, self._pinned)

    def promote(self, version: str) -> None:
        """From now on ``version`` answers ``ct_scan``."""
        with self._one_at_a_time:
            self._live = version

    def pin(self, version: str) -> None:
        """From now on ``version`` can be asked for by name."""
        with self._one_at_a_time:
            self._pinned |= {version}

    def retire(self, version: str) -> None:
        """From now on ``version`` can't be asked for by name."""
        with self._one_at_a_time:
            self._pinned -= {version}

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        """Answer at once."""
        future: Future[Tensors] = Future()
        try:
            with self._one_at_a_time:
                answer = self._answer(request)
        except AggregationError as error:
            future.set_exception(ServerRefused(str(error)))
        except VersionGone as error:
            future.set_exception(error)
        else:
            future.set_result({spec.name: answer[spec.name] for spec in request.outputs})
        return future

    def _answer(self, request: Request) -> dict[str, NDArray[Any]]:
        if request.model is contract.SCAN_AGGREGATOR:
            return self._aggregate(request.tensors, request.tensors[contract.SLICE_POSITIVE.name])
        lesions = _lesions(
            request.tensors[contract.HU.name], self._mark_from_hu.get(self._answering(request), MARK_FROM_HU)
        )
        pixels = lesions.sum(axis=(1, 2), dtype=np.int32)[:, None]
        positive = pixels >= POSITIVE_FROM_PIXELS
        return {
            contract.MASK.name: np.packbits(lesions, axis=-1),
            contract.LESION_PIXELS.name: pixels,
            contract.SLICE_POSITIVE.name: positive,
            **self._aggregate(request.tensors, positive),
        }

    def _answering(self, request: Request) -> str:
        if request.pin is not None and request.pin not in self._pinned:
            raise VersionGone(f"model {request.model.name} in memory: version {request.pin} can't be asked for by name")
        return request.pin or self._live

    def _aggregate(self, tensors: Tensors, positive: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
        keys, counts, indices = (
            tensors[spec.name][:, 0] for spec in (contract.STUDY, contract.SLICE_COUNT, contract.SLICE_INDEX)
        )
        for key in set(keys):
            rows = keys == key
            scan = self._scans.setdefault(key, ScanRows(int(counts[rows][0])))
            if (counts[rows] != scan.slice_count).any():
                raise AggregationError(f"another slice count than {scan.slice_count} given for one scan")
            scan.check(indices[rows], positive[rows, 0])
            scan.add(indices[rows], positive[rows, 0])
        findings = [self._scans[key].finding(self._positive_run) for key in keys]
        return {
            contract.SLICE_POSITIVE.name: positive,
            contract.LONGEST_RUN.name: np.array([[found.longest_run] for found in findings], np.int32),
            contract.SLICES_SEEN.name: np.array([[found.slices_seen] for found in findings], np.int32),
            contract.SCAN_COMPLETE.name: np.array([[found.complete] for found in findings]),
            contract.SCAN_POSITIVE.name: np.array([[found.positive] for found in findings]),
        }


def _lesions(hu: NDArray[Any], mark_from_hu: int) -> NDArray[np.bool_]:
    scale = contract.IMAGE_SIDE // hu.shape[1], contract.IMAGE_SIDE // hu.shape[2]
    marked: NDArray[np.bool_] = hu >= mark_from_hu
    return marked.repeat(scale[0], axis=1).repeat(scale[1], axis=2)
