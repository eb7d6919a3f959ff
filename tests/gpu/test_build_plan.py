"""Plans on a GPU: TensorRT's builder where it is installed, and the engine inspector, which opens the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

import logit_network
from groundglass.errors import ModelError, ParityError
from groundglass_export.gpu import Gpu, host_gpu
from groundglass_export.half import to_half
from groundglass_export.plan import PlanSettings, build_plan
from groundglass_export.plan_inspection import require_precision
from groundglass_export.tensorrt_runtime import load_tensorrt

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    """The GPU of this machine; skips where there is none."""
    found = host_gpu()
    if found is None:
        pytest.skip("no NVIDIA GPU or no driver here")
    return found


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def runtime(request: pytest.FixtureRequest, gpu: Gpu) -> str:
    """Each runtime that is installed."""
    try:
        load_tensorrt(request.param)
    except ModelError as error:
        pytest.skip(str(error))
    return str(request.param)


def test_the_inspector_sees_fp16(runtime: str) -> None:
    """The plan opens on this GPU, and the inspector finds its convolution in FP16; of an FP32 graph, it does not."""
    plan = build_plan(to_half(logit_network.unet()).model, PlanSettings(runtime, batch=(1, 2, 4)))
    assert plan.precision.source == "inspector"
    assert plan.precision.other_convolutions == ()
    with pytest.raises(ParityError, match="1 of 1 convolutions are not FP16"):
        require_precision(build_plan(logit_network.unet(), PlanSettings(runtime)).precision, "fp16")


def test_the_target_is_this_gpu(gpu: Gpu) -> None:
    """A plan of TensorRT is for the GPU that built it."""
    try:
        load_tensorrt("tensorrt")
    except ModelError as error:
        pytest.skip(str(error))
    target = build_plan(logit_network.unet(), PlanSettings("tensorrt")).target
    assert target["compute_capabilities"] == [gpu.compute_capability]
    assert target["driver"] == gpu.driver


def test_the_timing_cache_is_kept(runtime: str, tmp_path: Path) -> None:
    """TensorRT writes its measurements and reads them again, a damaged file included; RTX measures nothing."""
    cache = tmp_path / "timing.cache"
    settings = PlanSettings(runtime, timing_cache=cache)
    build_plan(logit_network.unet(), settings)
    assert cache.exists() == (runtime == "tensorrt")
    cache.write_bytes(b"damaged")
    build_plan(logit_network.unet(), settings)
    assert (cache.read_bytes() == b"damaged") == (runtime == "tensorrt_rtx")
