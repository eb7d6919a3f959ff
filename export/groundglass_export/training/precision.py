"""In which precision a training computes."""

from __future__ import annotations

import torch


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 where the device multiplies in it, float32 elsewhere.

    A CPU without such instructions emulates them: measured, a step of training took twice as long.
    """
    native = device.type != "cpu" or any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=native)
