"""A server in memory, for tests of code that uses the client: it keeps the tensor contract and runs no network."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from groundglass import contract
from groundglass.errors import AggregationError, ServerRefused
from groundglass.finding import ScanRows
from groundglass_client.buffers import Buffers
from groundglass_client.requests import Request, Tensors
from groundglass_client.transport import ServedScan

MARK_FROM_HU: Final = 0
POSITIVE_FROM_PIXELS: Final = 64


class InMemoryTransport:
    """Marks every pixel of 0 HU or more; a slice is positive from 64 marked pixels on.

    Slices must divide 512: each pixel fills a square of the mask. Scans are kept for the life of the object.
    """

    def __init__(self, positive_run: int = contract.POSITIVE_RUN) -> None:
        """``positive_run`` consecutive positive slices make a scan positive."""
        self._positive_run = positive_run
        self._scans: dict[bytes, ScanRows] = {}
        self._one_at_a_time = threading.Lock()  # as the real aggregator, which has one instance
        self._buffers = Buffers(shared=False)

    def buffers(self) -> Buffers:
        """Memory of this process."""
        return self._buffers

    def describe(self, timeout_s: float) -> ServedScan:
        """Version "1" of this very rule."""
        return ServedScan("1", self._positive_run)

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        """Answer at once."""
        future: Future[Tensors] = Future()
        try:
            with self._one_at_a_time:
                answer = self._answer(request)
        except AggregationError as error:
            future.set_exception(ServerRefused(str(error)))
        else:
            future.set_result({spec.name: answer[spec.name] for spec in request.outputs})
        return future

    def _answer(self, request: Request) -> dict[str, NDArray[Any]]:
        if request.model is contract.SCAN_AGGREGATOR:
            return self._aggregate(request.tensors, request.tensors[contract.SLICE_POSITIVE.name])
        lesions = _lesions(request.tensors[contract.HU.name])
        pixels = lesions.sum(axis=(1, 2), dtype=np.int32)[:, None]
        positive = pixels >= POSITIVE_FROM_PIXELS
        return {
            contract.MASK.name: np.packbits(lesions, axis=-1),
            contract.LESION_PIXELS.name: pixels,
            contract.SLICE_POSITIVE.name: positive,
            **self._aggregate(request.tensors, positive),
        }

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


def _lesions(hu: NDArray[Any]) -> NDArray[np.bool_]:
    scale = contract.IMAGE_SIDE // hu.shape[1], contract.IMAGE_SIDE // hu.shape[2]
    marked: NDArray[np.bool_] = hu >= MARK_FROM_HU
    return marked.repeat(scale[0], axis=1).repeat(scale[1], axis=2)
