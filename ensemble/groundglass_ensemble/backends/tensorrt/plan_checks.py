"""Is this plan the one that the configuration and its manifest speak of, and can this machine run it?

Plain values in, RuntimeError out: nothing here needs a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time the files of a backend's folder lie beside one another, in no package
    from groundglass_ensemble.backends.shared.stand_in_config import Config, check_dims, is_batching
else:
    from stand_in_config import check_dims, is_batching

RUNTIME_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
"""Names of the runtimes, by the name that a manifest gives them."""

_TRITON_TYPES = {
    "FLOAT": "TYPE_FP32",
    "HALF": "TYPE_FP16",
    "INT8": "TYPE_INT8",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "UINT8": "TYPE_UINT8",
    "BOOL": "TYPE_BOOL",
}
"""What a configuration calls a plan's types; the others (BF16, FP8, ...) have no counterpart in numpy."""

_AMPERE = (8, 0)


@dataclass(frozen=True)
class PlanTensor:
    """An input or output of a plan.

    ``shape`` has -1 where a size is free. ``smallest`` and ``largest`` are the bounds of an input's optimization
    profile, equal to ``shape`` for an output. ``plain`` says that it lies in device memory, row by row.
    """

    name: str
    kind: str
    datatype: str
    shape: tuple[int, ...]
    smallest: tuple[int, ...]
    largest: tuple[int, ...]
    plain: bool = True


@dataclass(frozen=True)
class Machine:
    """What would run a plan; ``capability`` is the GPU's compute capability, as in (9, 0)."""

    runtime: str
    version: str
    gpu: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        title = RUNTIME_TITLES.get(self.runtime, self.runtime)
        return f"{title} {self.version} on {self.gpu} (compute capability {_dotted(self.capability)})"


def check_target(path: Path, target: Mapping[str, Any], machine: Machine) -> None:
    """Raise RuntimeError when the manifest's ``target`` names another runtime, version or GPU than this machine's."""
    runtime, version = target.get("runtime", machine.runtime), target.get("version", machine.version)
    if runtime != machine.runtime:
        raise RuntimeError(
            f"{path} was built for {RUNTIME_TITLES.get(runtime, runtime)} {version}, and this server has "
            f"{RUNTIME_TITLES[machine.runtime]} {machine.version}: install that runtime, or build the plan where it "
            "is served"
        )
    if not _versions_fit(path, str(version), machine.version, bool(target.get("version_compatible"))):
        raise RuntimeError(
            f"{path} was built with {RUNTIME_TITLES[runtime]} {version}, and this server has {machine.version}: build "
            "the plan where it is served"
        )
    built, upwards = target.get("compute_capabilities", ()), _is_ampere_plus(target.get("hardware_compatibility"))
    capabilities = [_capability(path, text) for text in built]
    if capabilities and not _gpu_fits(capabilities, machine.capability, upwards):
        raise RuntimeError(
            f"{path} was built for compute capability {', '.join(map(_dotted, capabilities))}"
            f"{' and later' if upwards else ''}, and {machine.gpu} has {_dotted(machine.capability)}: build the plan "
            "for the GPU that serves it"
        )


def describe_target(target: Mapping[str, Any]) -> str:
    """For the message of a plan that can't be opened: what its manifest says of the machine that it was built for."""
    if not target:
        return "no manifest says what it was built for"
    runtime = str(target.get("runtime", "an unknown runtime"))
    capabilities = ", ".join(map(str, target.get("compute_capabilities", ()))) or "not named"
    return (
        f"its manifest says {RUNTIME_TITLES.get(runtime, runtime)} {target.get('version', 'of an unknown version')}, "
        f"compute capability {capabilities}"
    )


def check_plan(config: Config, tensors: Sequence[PlanTensor]) -> None:
    """Raise RuntimeError where the configuration and the plan disagree, in tensors or in the size of a batch."""
    for kind in ("input", "output"):
        known = {tensor.name: tensor for tensor in tensors if tensor.kind == kind}
        for configured in config[kind]:
            if configured["name"] not in known:
                raise RuntimeError(
                    f"configured {kind} '{configured['name']}' is not in the plan: it has {sorted(known)}"
                )
            _check_tensor(configured, known[configured["name"]], is_batching(config))
    configured_inputs = {configured["name"] for configured in config["input"]}
    for tensor in tensors:
        if tensor.kind == "input" and tensor.name not in configured_inputs:
            raise RuntimeError(f"the plan's input '{tensor.name}' is not in the configuration: it would get no values")
    if is_batching(config):
        _check_batch(int(config["max_batch_size"]), [tensor for tensor in tensors if tensor.kind == "input"])


def _check_tensor(configured: Config, tensor: PlanTensor, batching: bool) -> None:
    if not tensor.plain:
        raise RuntimeError(
            f"{tensor.kind} '{tensor.name}' of the plan is a shape tensor or of a format that is not linear"
        )
    datatype = _TRITON_TYPES.get(tensor.datatype)
    if datatype != configured["data_type"]:
        raise RuntimeError(
            f"{tensor.kind} '{tensor.name}' is {configured['data_type']} in the configuration, "
            f"{datatype or tensor.datatype} in the plan"
        )
    check_dims(tensor.kind, configured, [None if size == -1 else size for size in tensor.shape], batching)


def _check_batch(max_batch_size: int, inputs: Sequence[PlanTensor]) -> None:
    for tensor in inputs:
        smallest, largest = tensor.smallest[0], tensor.largest[0]
        if largest < max_batch_size or smallest > 1:
            raise RuntimeError(
                f"the plan's optimization profile takes batches of {smallest} to {largest} of '{tensor.name}', and "
                f"max_batch_size is {max_batch_size}: build the plan for 1 to {max_batch_size}, or lower max_batch_size"
            )


def _versions_fit(path: Path, built: str, here: str, version_compatible: bool) -> bool:
    """A version-compatible plan runs on the version that built it and on later ones, any other one on its own only.

    https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-compatibility.html
    """
    return built == here or (version_compatible and _numbers(path, built) <= _numbers(path, here))


def _numbers(path: Path, version: str) -> tuple[int, ...]:
    parts = version.split(".")
    if not all(part.isdigit() for part in parts):
        raise RuntimeError(f"the manifest of {path} is damaged: version {version!r}, expected one like '11.4.1.9'")
    return tuple(map(int, parts))


def _is_ampere_plus(compatibility: object) -> bool:
    """As TensorRT's HardwareCompatibilityLevel names it, in any case; a plain True is the same."""
    return compatibility is True or str(compatibility).lower() == "ampere_plus"


def _gpu_fits(built: Sequence[tuple[int, int]], here: tuple[int, int], upwards: bool) -> bool:
    return here in built or (upwards and here >= max(_AMPERE, min(built)))


def _capability(path: Path, text: object) -> tuple[int, int]:
    major, _, minor = str(text).partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise RuntimeError(f"the manifest of {path} is damaged: compute capability {text!r}, expected one like '9.0'")
    return int(major), int(minor)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
