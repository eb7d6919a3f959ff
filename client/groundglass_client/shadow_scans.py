"""Scans of shadow traffic: their keys under the candidate, and the verdicts of both versions once all slices are in."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from groundglass import contract
from groundglass_client.requests import Tensors

StudyKey = Any
"""An opaque value; what is in a BYTES tensor is bytes for us, and text for some callers."""


@dataclass(frozen=True, slots=True)
class ScanVerdict:
    """A whole scan, as one version's server gives it."""

    longest_run: int
    positive: bool


@dataclass(slots=True)
class _Scan:
    candidate_key: bytes
    live: ScanVerdict | None = None
    candidate: ScanVerdict | None = None
    compared: bool = False


class ShadowScans:
    """The latest scans by their live key, at most ``most`` of them. Not for several threads at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._scans: OrderedDict[StudyKey, _Scan] = OrderedDict()
        self.compared = self.verdict_differs = self.run_differs = 0
        self.not_compared = 0
        """Scans that had to make room, or were still open at the end, before both versions had seen all of them."""

    def candidate_key(self, live_key: StudyKey) -> bytes:
        """The key of that scan under the candidate: its own, so that neither version's slices count for the other.

        Rows of probes, which no server keeps, stay what they are.
        """
        if not live_key:
            return contract.PROBE_STUDY
        scan = self._scans.get(live_key)
        if scan is None:
            scan = self._scans[live_key] = _Scan(secrets.token_hex(16).encode())
            if len(self._scans) > self._most:
                self._drop(self._scans.popitem(last=False)[1])
        return scan.candidate_key

    def add(self, live: Mapping[StudyKey, ScanVerdict], candidate: Mapping[StudyKey, ScanVerdict]) -> None:
        """Take in the verdicts on whole scans of one request, by live key, and compare those that are there twice."""
        for key in {*live, *candidate}:
            scan = self._scans.get(key)
            if scan is None or scan.compared:
                continue
            scan.live = scan.live or live.get(key)
            scan.candidate = scan.candidate or candidate.get(key)
            if scan.live is not None and scan.candidate is not None:
                scan.compared = True
                self._compare(scan.live, scan.candidate)

    def close(self) -> None:
        """Nothing more comes: what is still open was not compared."""
        while self._scans:
            self._drop(self._scans.popitem()[1])

    def _compare(self, live: ScanVerdict, candidate: ScanVerdict) -> None:
        self.compared += 1
        self.verdict_differs += live.positive != candidate.positive
        self.run_differs += live.longest_run != candidate.longest_run

    def _drop(self, scan: _Scan) -> None:
        self.not_compared += not scan.compared


def read_scans(answer: Tensors, keys: Sequence[StudyKey]) -> dict[StudyKey, ScanVerdict]:
    """The scans that an answer completes, by the live key of their rows; none where it does not say."""
    wanted = (contract.SCAN_COMPLETE, contract.LONGEST_RUN, contract.SCAN_POSITIVE)
    if any(spec.name not in answer or answer[spec.name].shape != (len(keys), 1) for spec in wanted):
        return {}
    complete, runs, positives = (answer[spec.name][:, 0] for spec in wanted)
    return {
        key: ScanVerdict(int(run), bool(positive))
        for key, whole, run, positive in zip(keys, complete, runs, positives, strict=True)
        if whole
    }
