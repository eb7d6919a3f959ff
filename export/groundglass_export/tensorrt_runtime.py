"""TensorRT 10.12 to 11 and TensorRT-RTX under one face: everything in which their Python APIs differ is here.

TensorRT: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/
TensorRT-RTX: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from groundglass.errors import ModelError, SettingError
from groundglass_export.plan_reports import BuildLog, Phases

LEAST_VERSION: Final = (10, 12)
"""Of ``tensorrt``: what the builder is written for. RTX counts its versions anew."""

_MODULES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    # RTX's own package wraps its bindings, which can also be installed without it.
    {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
)
RUNTIMES: Final = ("auto", *_MODULES)
_INSTALL: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tensorrt": "TensorRT for Triton: work inside the container that will serve the plan, with pip install "
        "'tensorrt==' and that container's version",
        "tensorrt_rtx": "TensorRT-RTX for this computer: pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
    }
)


@dataclass(frozen=True, slots=True)
class TensorRt:
    """One of the two runtimes: ``name`` as manifests have it, and its Python module."""

    name: str
    api: Any = field(repr=False)

    @property
    def version(self) -> str:
        """As the runtime says it."""
        return str(self.api.__version__)

    @property
    def title(self) -> str:
        """For a message."""
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {self.version}"

    @property
    def is_rtx(self) -> bool:
        """RTX builds without a GPU, for GPUs that it is told; TensorRT on the GPU that will run the plan."""
        return self.name == "tensorrt_rtx"


def load_tensorrt(choice: str = "auto") -> TensorRt:
    """The runtime that ``choice`` names: ``tensorrt``, ``tensorrt_rtx``, or ``auto``, the first that is installed.

    Raises SettingError for another word, ModelError when it is not installed or too old: it says what to install.
    """
    if choice not in RUNTIMES:
        raise SettingError(f"runtime {choice!r}: expected one of {', '.join(RUNTIMES)}")
    wanted = tuple(_MODULES) if choice == "auto" else (choice,)
    for name in wanted:
        for module in _MODULES[name]:
            try:
                found = TensorRt(name, importlib.import_module(module))
            except (ImportError, OSError):  # not installed, or its shared library isn't
                continue
            _refuse_old(found)
            return found
    ways = "; or ".join(_INSTALL[name] for name in wanted)
    raise ModelError(f"no TensorRT is installed here, and a plan must be built by the one that serves it. {ways}")


def _refuse_old(found: TensorRt) -> None:
    numbers = tuple(int(part) for part in re.findall(r"\d+", found.version)[:2])
    if not found.is_rtx and numbers < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ModelError(f"{found.title} is too old: expected {least} or newer; serve from a newer container")


def new_logger(runtime: TensorRt, log: BuildLog) -> Any:
    """A logger that fills ``log`` and prints nothing. It must outlive what is made with it."""

    class Relay(runtime.api.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            runtime.api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.take(severity.name, message)

    return Relay()


def new_monitor(runtime: TensorRt, phases: Phases) -> Any | None:
    """TensorRT's progress monitor; None where the API has none."""
    if not hasattr(runtime.api, "IProgressMonitor"):
        return None

    class Monitor(runtime.api.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            runtime.api.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

    return Monitor()


def strongly_typed_network(runtime: TensorRt, builder: Any) -> Any:
    """An empty network that keeps the types of its graph: a flag in TensorRT 10, the only kind from 11 on."""
    flag = getattr(runtime.api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if flag is None else 1 << int(flag))


def parser_complaint(runtime: TensorRt, parser: Any, name: str) -> str:
    """Why the parser refused a graph: the nodes, their operators and its reason, on one line."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    nodes = [f"{error.node_operator()} ({error.node_name()!r})" for error in errors if error.node_operator()]
    reasons = {" ".join(str(error.desc()).split()) for error in errors} - {"false", ""}
    what = f"the operator {', '.join(dict.fromkeys(nodes))}" if nodes else "the graph"
    return f"{runtime.title} does not take {what} of {name!r}" + (f": {min(reasons)}" if reasons else "")


def set_targets(runtime: TensorRt, config: Any, capabilities: Sequence[str]) -> None:
    """Build for these compute capabilities, as in ``8.9``; none: RTX's portable engine, or TensorRT's own GPU.

    Raises SettingError for one that the runtime doesn't know, and for TensorRT, which builds for the GPU at hand.
    """
    if not capabilities:
        return
    if not runtime.is_rtx:
        raise SettingError(f"{runtime.title} builds for the GPU at hand; compute capabilities are chosen for RTX only")
    known = {name: value for name, value in runtime.api.ComputeCapability.__members__.items() if name.startswith("SM")}
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        target = known.get("SM" + capability.replace(".", ""))
        if target is None or not config.set_compute_capability(target, index):
            words = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in known)
            raise SettingError(f"{runtime.title} does not build for compute capability {capability}; it knows {words}")


def set_compatibility(runtime: TensorRt, config: Any, *, version: bool, hardware: bool) -> None:
    """Plans that run under later versions of the same major one, or on every GPU since Ampere.

    Raises SettingError for RTX, which refuses both: its plans are portable across GPUs already.
    """
    if runtime.is_rtx and (version or hardware):
        raise SettingError(f"{runtime.title} has no compatibility options: leave them out, and name GPUs if you must")
    if version:
        config.set_flag(runtime.api.BuilderFlag.VERSION_COMPATIBLE)
    if hardware:
        config.hardware_compatibility_level = runtime.api.HardwareCompatibilityLevel.AMPERE_PLUS
