"""What a manifest says of the tools and constants behind an export."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version

from groundglass.contract import LUNG_WINDOW_CENTRE_HU, LUNG_WINDOW_WIDTH_HU

EXPORT_PACKAGES = ("groundglass", "torch", "onnx", "onnxscript", "onnxruntime")
"""Packages that decide the bytes of an ONNX export."""


def current_versions(packages: Iterable[str] = EXPORT_PACKAGES) -> dict[str, str]:
    """Versions of the packages that an export depends on."""
    return {package: version(package) for package in packages}


def lung_window() -> dict[str, float]:
    """The window that the preprocess graph applies, in Hounsfield units."""
    return {"centre": LUNG_WINDOW_CENTRE_HU, "width": LUNG_WINDOW_WIDTH_HU}
