"""The inputs of a request, and the rows that belong to it in the outputs of its batch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Feed = dict[str, NDArray[Any]]
"""The inputs of one request, by name."""


def split_rows(names: list[str], outputs: list[NDArray[Any]], feeds: list[Feed]) -> list[list[NDArray[Any]]]:
    """The rows of every request, from outputs of the batch that held them all."""
    if len(feeds) == 1:
        return [outputs]
    sizes = [len(next(iter(feed.values()))) for feed in feeds]
    for name, output in zip(names, outputs, strict=True):
        if len(output) != sum(sizes):
            raise ValueError(f"output {name} has {len(output)} rows for a batch of {sum(sizes)}")
    ends = np.cumsum(sizes)[:-1]
    return [list(part) for part in zip(*(np.split(output, ends) for output in outputs), strict=True)]
