"""Where a study's time went, chunk by chunk, as the client saw it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """The way of one chunk through the client, in seconds since the study's start.

    ``decode_s`` is the time that decoding its slices took, summed over them: threads decode side by side, so it may be
    longer than the time from the first to ``decoded_s``, when the last of them was done. ``sent_s`` is when its first
    request went out, ``answered_s`` when it was answered after ``attempts`` requests.
    """

    slices: int
    decode_s: float
    decoded_s: float
    sent_s: float
    answered_s: float
    attempts: int
