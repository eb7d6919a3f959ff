"""Load: whole studies sent to a server by locust, their verdicts checked and their latencies kept unrounded."""

from groundglass_bench.load.result import LoadResult
from groundglass_bench.load.runner import run_load
from groundglass_bench.load.samples import Sample
from groundglass_bench.load.settings import Load

__all__ = ["Load", "LoadResult", "Sample", "run_load"]
