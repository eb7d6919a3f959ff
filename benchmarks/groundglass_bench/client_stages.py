"""Where a study's time went on the client's side, from the spans of its chunks."""

from __future__ import annotations

from collections.abc import Sequence

from groundglass_bench.result import Table
from groundglass_client.spans import ChunkSpan


def client_table(spans: Sequence[ChunkSpan]) -> Table:
    """Milliseconds a slice: decoding, waiting to be sent, being answered; and requests that were sent again."""
    slices = max(1, sum(span.slices for span in spans))
    parts = {
        "decode (all threads together)": sum(span.decode_s for span in spans),
        "decoded, waiting to be sent": sum(span.sent_s - span.decoded_s for span in spans),
        "sent, until answered (chunks overlap)": sum(span.answered_s - span.sent_s for span in spans),
    }
    rows = [(part, round(1000 * seconds / slices, 3)) for part, seconds in parts.items()]
    again = sum(span.attempts - 1 for span in spans)
    return Table(f"Client, {len(spans)} chunks, {again} sent again", ("part", "ms a slice"), tuple(rows))
