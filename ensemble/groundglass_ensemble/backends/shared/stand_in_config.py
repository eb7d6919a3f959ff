"""What every stand-in reads from a model's own configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Config = dict[str, Any]


def find_model_file(args: dict[str, str], config: Config, default: str) -> Path:
    """The file of the version that Triton asks for; raises RuntimeError when it is missing.

    A folder in its place is a model with external data: the file lies inside, under its default name.
    """
    path = Path(args["model_repository"]) / args["model_version"] / (config.get("default_model_filename") or default)
    if path.is_dir():
        path /= default
    if not path.is_file():
        raise RuntimeError(f"model '{args['model_name']}' version {args['model_version']} has no file {path}")
    return path


def is_batching(config: Config) -> bool:
    """Whether the first axis of every tensor is the batch."""
    return int(config.get("max_batch_size", 0)) > 0


def check_dims(kind: str, tensor: Config, shape: Sequence[Any], batching: bool) -> None:
    """Raise RuntimeError when fixed sizes differ; whatever is no integer in ``shape`` stands for a free one."""
    dims = [int(size) for size in tensor.get("reshape", {}).get("shape", tensor["dims"])]
    expected = [-1, *dims] if batching else dims
    fixed = [(a, b) for a, b in zip(expected, shape, strict=False) if a != -1 and isinstance(b, int)]
    if shape and (len(expected) != len(shape) or any(a != b for a, b in fixed)):
        raise RuntimeError(
            f"{kind} '{tensor['name']}' is {expected} in the configuration (batch first), {list(shape)} in the model"
        )


def first_line(error: Exception) -> str:
    """What an error says, for a log of one line an event."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
