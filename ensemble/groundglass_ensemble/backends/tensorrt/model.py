"""Stand-in for Triton's TensorRT backend, for servers that have none: plans run under TensorRT's Python runtime.

Triton takes this file only where ``libtriton_tensorrt.so`` is missing. It needs a GPU, a runtime (package ``tensorrt``,
or TensorRT-RTX's bindings) and ``cuda-bindings``, and says in one line which of them a server lacks. It reads the
model's own configuration, and holds nothing of the project that ships it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time the files of a backend's folder lie beside one another, in no package
    from groundglass_ensemble.backends.shared.stand_in_config import find_model_file, first_line
    from groundglass_ensemble.backends.shared.stand_in_manifest import check_file
    from groundglass_ensemble.backends.shared.stand_in_requests import Requests
    from groundglass_ensemble.backends.tensorrt.cuda_memory import Cuda, why_no_gpu
    from groundglass_ensemble.backends.tensorrt.plan_checks import Machine, check_plan, check_target, describe_target
    from groundglass_ensemble.backends.tensorrt.plan_file import OpenPlan, PlanFailed, installed_runtimes, open_plan
    from groundglass_ensemble.backends.tensorrt.plan_runner import PlanRunner
else:
    from cuda_memory import Cuda, why_no_gpu
    from plan_checks import Machine, check_plan, check_target, describe_target
    from plan_file import PlanFailed, installed_runtimes, open_plan
    from plan_runner import PlanRunner
    from stand_in_config import find_model_file, first_line
    from stand_in_manifest import check_file
    from stand_in_requests import Requests

_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
"""What NVIDIA's driver leaves in /dev, on Linux and on Linux under Windows."""


class TritonPythonModel:
    """One instance of a plan: one stream, one set of buffers."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the plan; raises RuntimeError, with the reason in its first line, when it can't be served."""
        config = json.loads(args["model_config"])
        runtimes = list(installed_runtimes())
        cuda_runtime = _cuda_runtime()
        _check_machine(args, runtimes, cuda_runtime)
        path = find_model_file(args, config, "model.plan")
        manifest = check_file(path)
        cuda = Cuda(cuda_runtime, int(args["model_instance_device_id"]))
        try:
            plan = _open(path, manifest.get("target") or {}, runtimes, cuda)
            check_plan(config, plan.tensors)
            self._runner = PlanRunner(plan, cuda)
        except Exception as error:
            cuda.close()
            raise RuntimeError(first_line(error)) from None
        self._requests = Requests(config, "TensorRT", self._runner.run)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request: those of one shape run as one batch, and each fails on its own."""
        return self._requests.answer(requests)

    def finalize(self) -> None:
        """Give back the plan's memory and the GPU's."""
        self._runner.close()


def _check_machine(args: Mapping[str, str], runtimes: Sequence[object], cuda_runtime: Any) -> None:
    missing = []
    if not any(Path(file).exists() for file in _DRIVERS):
        missing.append("an NVIDIA GPU")
    elif cuda_runtime and (reason := why_no_gpu(cuda_runtime)):
        missing.append(f"an NVIDIA GPU that CUDA can use ({reason})")
    if not runtimes:
        missing.append("a TensorRT runtime (package tensorrt, or tensorrt-rtx with its bindings)")
    if not cuda_runtime:
        missing.append("CUDA's Python bindings (package cuda-bindings)")
    if missing:
        raise RuntimeError(
            f"model '{args['model_name']}' is a TensorRT plan, and this server lacks {', '.join(missing)}: serve its "
            "ONNX variant instead (--model-config-name=cpu), or serve the repository in NVIDIA's Triton container"
        )
    if args["model_instance_kind"] != "GPU":
        raise RuntimeError(
            f"model '{args['model_name']}' is a TensorRT plan, which runs on a GPU, and its instance_group is of "
            f"KIND_{args['model_instance_kind']}: KIND_GPU is needed"
        )


def _cuda_runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError):
        return None


def _open(path: Path, target: Mapping[str, Any], runtimes: Sequence[tuple[str, Any]], cuda: Cuda) -> OpenPlan:
    """The plan, under the runtime that its manifest names, or else under the first one that takes it."""
    named = [(name, module) for name, module in runtimes if name == target.get("runtime", name)]
    refusals = []
    for name, module in named or runtimes[:1]:
        machine = Machine(name, module.__version__, cuda.name(), cuda.capability())
        check_target(path, target, machine)
        try:
            return open_plan(module, path.read_bytes(), bool(target.get("version_compatible")))
        except PlanFailed as error:
            refusals.append(f"{machine} ({first_line(error)})")
    raise RuntimeError(f"{path} can't be loaded by {' or by '.join(refusals)}; {describe_target(target)}")
