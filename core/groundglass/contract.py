"""The tensor contract: every name, type and shape that crosses a process boundary.

The ``config.pbtxt`` files, the exported graphs and the clients are tested against this module, and it is the only place
that spells a tensor's name. Every row of a batch is one slice and describes itself, so rows of different studies may
share a batch, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

ANY: Final = -1
"""A dimension that the caller chooses."""

IMAGE_SIDE: Final = 512
"""Rows and columns, in pixels, that the network sees (Lokwani et al., arXiv:2006.13212)."""

MASK_ROW_BYTES: Final = IMAGE_SIDE // 8
"""Bytes of one row of a bit-packed mask: 1 bit a pixel, big-endian bits, as ``numpy.packbits`` writes them."""

LUNG_WINDOW_CENTRE_HU: Final = -600.0
LUNG_WINDOW_WIDTH_HU: Final = 1500.0
"""The lung window: Hounsfield units from -1350 to 150 become 0 to 1; what lies outside is clipped."""

POSITIVE_RUN: Final = 15
"""Consecutive positive slices that make a scan positive (Lokwani et al., arXiv:2006.13212)."""

MAX_BATCH: Final = 64
"""Rows that a single request to ``ct_scan`` may carry."""

PROBE_STUDY: Final = b""
"""The study key of readiness probes and warm-ups: its rows are folded on their own, and never kept or counted."""

MAX_SCAN_SLICES: Final = 65_536
"""Slices that a scan may have: far above any scanner, and a bound on the memory that a wrong slice count can claim.
``scan_aggregator`` takes as many rows at once, so that a whole scan folds in one request."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the contract.

    ``datatype`` is Triton's name for it (``INT16``, ``BYTES``), ``dims`` is the shape of one row without the batch
    axis; :data:`ANY` marks a free dimension.
    """

    name: str
    datatype: str
    dims: tuple[int, ...]


HU: Final = TensorSpec("HU", "INT16", (ANY, ANY))
STUDY: Final = TensorSpec("STUDY", "BYTES", (1,))
SLICE_INDEX: Final = TensorSpec("SLICE_INDEX", "INT32", (1,))
SLICE_COUNT: Final = TensorSpec("SLICE_COUNT", "INT32", (1,))

IMAGE: Final = TensorSpec("IMAGE", "FP32", (1, IMAGE_SIDE, IMAGE_SIDE))

MASK: Final = TensorSpec("MASK", "UINT8", (IMAGE_SIDE, MASK_ROW_BYTES))
LESION_PIXELS: Final = TensorSpec("LESION_PIXELS", "INT32", (1,))
SLICE_POSITIVE: Final = TensorSpec("SLICE_POSITIVE", "BOOL", (1,))

LONGEST_RUN: Final = TensorSpec("LONGEST_RUN", "INT32", (1,))
SLICES_SEEN: Final = TensorSpec("SLICES_SEEN", "INT32", (1,))
SCAN_COMPLETE: Final = TensorSpec("SCAN_COMPLETE", "BOOL", (1,))
SCAN_POSITIVE: Final = TensorSpec("SCAN_POSITIVE", "BOOL", (1,))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What one model of the repository takes and gives, in the order that its config lists them.

    ``max_batch`` is the number of rows that one request may carry.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int = MAX_BATCH


PREPROCESS: Final = ModelSpec("preprocess", (HU,), (IMAGE,))
UNET: Final = ModelSpec("unet", (IMAGE,), (MASK, LESION_PIXELS, SLICE_POSITIVE))
SCAN_AGGREGATOR: Final = ModelSpec(
    "scan_aggregator",
    (STUDY, SLICE_INDEX, SLICE_COUNT, SLICE_POSITIVE),
    (SLICE_POSITIVE, LONGEST_RUN, SLICES_SEEN, SCAN_COMPLETE, SCAN_POSITIVE),
    MAX_SCAN_SLICES,
)
"""It hands ``SLICE_POSITIVE`` on unchanged: a tensor that is both an output of an ensemble and the input of a later
step makes Triton drop steps when a request asks for some outputs only (``ct_scan``'s config says how)."""
CT_SCAN: Final = ModelSpec(
    "ct_scan",
    (HU, STUDY, SLICE_INDEX, SLICE_COUNT),
    (MASK, LESION_PIXELS, SLICE_POSITIVE, LONGEST_RUN, SLICES_SEEN, SCAN_COMPLETE, SCAN_POSITIVE),
)
ENSEMBLE_STEPS: Final = (PREPROCESS, UNET, SCAN_AGGREGATOR)
"""The models that ``ct_scan`` chains, in the order of the flow."""

PIN_PREFIX: Final = "ct_scan_v"
"""An ensemble of this name and a version of ``unet`` is ``ct_scan`` with that very version in it, whichever is live."""


NEWEST: Final = -1
"""The version of a step of an ensemble that stands for the newest one that is loaded."""


def pinned(version: str) -> ModelSpec:
    """The ensemble that only ``version`` of ``unet`` answers: where a study goes whose slices must all be of one."""
    return replace(CT_SCAN, name=f"{PIN_PREFIX}{version}")


MODELS: Final = (CT_SCAN, *ENSEMBLE_STEPS)

RUN_PARAMETER: Final = "positive_run_slices"
TTL_PARAMETER: Final = "study_ttl_s"
CAPACITY_PARAMETER: Final = "max_studies"
"""Parameters of ``scan_aggregator``'s config: the run that makes a scan positive, and the bounds of its state."""
