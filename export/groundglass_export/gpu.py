"""The GPU that this process would use, asked of the driver itself: no torch and no CUDA toolkit are needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, CUDA driver API
_CAPABILITY_MINOR = 76
_NAME_BYTES = 100


@dataclass(frozen=True, slots=True)
class Gpu:
    """Name, compute capability as in ``9.0``, and version of the driver ("" when it does not say)."""

    name: str
    compute_capability: str
    driver: str


def host_gpu() -> Gpu | None:
    """The first GPU that CUDA shows to this process; None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    numbers = [ctypes.c_int(), ctypes.c_int()]
    for number, attribute in zip(numbers, (_CAPABILITY_MAJOR, _CAPABILITY_MINOR), strict=True):
        if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    cuda.cuDeviceGetName(name, _NAME_BYTES, device)
    return Gpu(name.value.decode(errors="replace"), ".".join(str(number.value) for number in numbers), _driver())


def _driver() -> str:
    """Of NVIDIA's management library, which comes with the driver."""
    try:
        management = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ""
    version = ctypes.create_string_buffer(_NAME_BYTES)
    if management.nvmlInit_v2() or management.nvmlSystemGetDriverVersion(version, _NAME_BYTES):
        return ""
    return version.value.decode(errors="replace")
