"""A plan for this machine, built only when the one that lies there does not fit: for the start of a deployment.

``python3 -m groundglass_export.ensure_plan FP16_GRAPH PLAN``, inside the container that serves the plan, on its GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from groundglass.errors import GroundglassError, ModelError, RepositoryError, SettingError
from groundglass.manifest import Manifest, check_digest, file_digest, read_manifest
from groundglass_export.gpu import Gpu, host_gpu
from groundglass_export.plan import PlanSettings
from groundglass_export.plan_export import export_plan
from groundglass_export.tensorrt_runtime import RUNTIMES, TensorRt, load_tensorrt

_AMPERE: Final = 8
"""Major compute capability from which a hardware-compatible plan runs."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What would open the plan: a TensorRT and its version, and the GPU, None where there is none."""

    runtime: str
    version: str
    gpu: Gpu | None

    def __str__(self) -> str:
        gpu = f"{self.gpu.name} (compute capability {self.gpu.compute_capability})" if self.gpu else "no GPU"
        return f"{self.runtime} {self.version} on {gpu}"


def ensure_plan(graph: Path, plan: Path, runtime: str = "auto") -> str:
    """Build ``plan`` from the FP16 ``graph`` unless it fits this machine and that graph. Returns what was done.

    The graph may be missing where the plan fits the machine. The plan's folder must exist: a version that was retired
    is not brought back. Raises SettingError, ModelError (also for TensorRT without a GPU), and what ``export_plan``
    raises; an old plan is then left as it was.
    """
    if not plan.parent.is_dir():
        raise SettingError(f"{plan.parent} is no folder: that version is not in the repository (UNET_VERSION)")
    machine = _this_machine(load_tensorrt(runtime))
    reason = misfit(plan, graph, machine)
    if reason is None:
        return f"{plan} fits {machine}: left as it is"
    if not graph.is_file():
        raise ModelError(
            f"{graph}: no such file, and {reason}: make it with groundglass export fp16 --model "
            "build/unet/1/model.onnx --out build/fp16/model.onnx"
        )
    print(f"building {plan} for {machine}, which takes minutes: {reason}", file=sys.stderr, flush=True)
    export_plan(graph, plan, PlanSettings(runtime=machine.runtime))
    return f"{plan} was built for {machine}"


def misfit(plan: Path, graph: Path, machine: Machine) -> str | None:
    """Why ``plan`` can't be served by ``machine``, or is not of ``graph``; None when it can be left as it is."""
    if not plan.is_file():
        return f"there is no {plan.name} yet"
    try:
        manifest = read_manifest(plan)
        check_digest(plan, manifest)
    except RepositoryError as error:
        return str(error)
    if graph.is_file() and file_digest(graph) not in {source.sha256 for source in manifest.sources}:
        return f"the old one was made from another graph than {graph}"
    return _target_misfit(manifest, machine)


def _target_misfit(manifest: Manifest, machine: Machine) -> str | None:
    target = manifest.target
    built = (target.get("runtime"), target.get("version"))
    if built != (machine.runtime, machine.version):
        return f"the old one was built with {built[0]} {built[1]}"
    if machine.gpu is None:  # TensorRT-RTX, which builds for GPUs that aren't here
        return None
    here = machine.gpu.compute_capability
    capabilities = [str(one) for one in target.get("compute_capabilities", ())]
    ampere_plus = target.get("hardware_compatibility") == "ampere_plus"
    if here in capabilities or (ampere_plus and int(here.partition(".")[0]) >= _AMPERE):
        return None
    return f"the old one was built for compute capability {', '.join(capabilities) or 'unknown'}"


def _this_machine(runtime: TensorRt) -> Machine:
    gpu = host_gpu()
    if gpu is None and not runtime.is_rtx:
        raise ModelError(f"{runtime.title} finds no GPU here: a plan is built on the GPU that will serve it")
    return Machine(runtime.name, runtime.version, gpu)


def main(arguments: Sequence[str]) -> int:
    """Ensure one plan. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="groundglass_export.ensure_plan", description="Build a plan if none fits.")
    parser.add_argument("graph", type=Path, metavar="FP16_GRAPH", help="what groundglass export fp16 wrote")
    parser.add_argument("plan", type=Path, metavar="PLAN", help="unet/<version>/model.plan of the repository")
    parser.add_argument("--runtime", choices=RUNTIMES, default="auto", help="the first that is installed, or this one")
    given = parser.parse_args(arguments)
    try:
        print(ensure_plan(given.graph, given.plan, given.runtime))
    except (GroundglassError, OSError) as error:
        print(f"ensure_plan: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
