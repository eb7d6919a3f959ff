"""The parity gate: a candidate version of ``unet`` against the FP32 reference, slice by slice and scan by scan.

A version that is not equivalent can't be staged. What counts as equivalent lies in :mod:`.limits`; ``verify`` compares,
``require`` refuses, and :mod:`.picture` shows the worst slice.
"""

from groundglass_export.gate.comparison import Comparison, GateScan
from groundglass_export.gate.limits import LIMITS, GateLimits
from groundglass_export.gate.report import GateReport, require
from groundglass_export.gate.verify import same_decision, verify

__all__ = ["LIMITS", "Comparison", "GateLimits", "GateReport", "GateScan", "require", "same_decision", "verify"]
