"""What turns probabilities into verdicts. It needs no torch: it is read where models are checked and served too."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from groundglass.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Calibration:
    """What turns probabilities into verdicts: decided on validation data, carried by checkpoint, graph and manifest.

    A pixel is lesion when its probability is at least ``probability_threshold``; a slice is positive when at least
    ``min_lesion_pixels`` of its 512x512 pixels are.
    """

    probability_threshold: float = 0.5
    min_lesion_pixels: int = 80

    def __post_init__(self) -> None:
        if not 0.0 < self.probability_threshold < 1.0:
            raise CheckpointError(
                f"probability threshold {self.probability_threshold}: expected a value between 0 and 1"
            )
        if self.min_lesion_pixels < 1:
            raise CheckpointError(f"min_lesion_pixels {self.min_lesion_pixels}: expected at least 1")

    def as_dict(self) -> dict[str, float]:
        """For metadata and manifest."""
        return asdict(self)
