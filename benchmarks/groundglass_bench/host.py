"""Where and with what a figure was measured: without it a figure says nothing."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "groundglass",
    "numpy",
    "nvidia-pytriton",
    "tritonclient",
    "grpcio",
    "locust",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "nvidia-modelopt",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
)


def describe_host(threads: int, on_gpu: bool) -> dict[str, Any]:
    """Machine, versions, commit and date; a dirty working tree is told."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "gpu": find_gpu() if on_gpu else None,
        "versions": {package: _version(package) for package in PACKAGES if _version(package)},
    }


def _commit() -> str:
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return f"{head} and changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def find_gpu() -> dict[str, Any] | None:
    """The first NVIDIA GPU of this machine, by torch if it sees one, else by the driver's tool; None without any."""
    try:
        import torch
    except ImportError:
        return _gpu_of_driver()
    return _gpu_of_torch() if torch.cuda.is_available() else _gpu_of_driver()


def _gpu_of_driver() -> dict[str, Any] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = "--query-gpu=name,compute_cap,memory.total"
    try:
        done = subprocess.run(  # noqa: S603
            [program, query, "--format=csv,noheader,nounits"], check=True, capture_output=True, text=True, timeout=30
        )
        name, capability, memory_mib = done.stdout.splitlines()[0].split(", ")
        memory_gib = round(float(memory_mib) / 1024, 1)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    return {"name": name, "compute_capability": capability, "memory_gib": memory_gib, "cuda": None}


def _gpu_of_torch() -> dict[str, Any]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {
        "name": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
        "memory_gib": round(memory_gib, 1),
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
