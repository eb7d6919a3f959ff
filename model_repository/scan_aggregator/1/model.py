"""Triton looks for the stage here; it lives in the package, where it is tested."""

from groundglass_ensemble.scan_aggregator import TritonPythonModel

__all__ = ["TritonPythonModel"]
