"""`groundglass bench`: the whole stack measured, scenario by scenario, and a report of it."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from groundglass.cli.serving import DEFAULT_REPOSITORY, EMBEDDED_CONFIG, Repository
from groundglass.cli.terminal import extra
from groundglass.errors import SettingError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from groundglass_bench.result import ScenarioResult
    from groundglass_bench.serving import BareEngine, RunNetwork

RESULTS: Final = Path("benchmarks/results")
QUICK_RESULTS: Final = Path("out/bench-quick")
WEIGHTS: Final = Path("export/weights")

_PLAN_BATCHES: Final = (1, 8, 16, 32, 64)
_PLAN_RUNS: Final = 8
"""Enqueued together, so that the GPU never waits for Python."""


def bench(
    server: Annotated[
        str | None,
        typer.Option(
            help="Triton's gRPC endpoint, HOST:PORT. Default: embedded servers, booted as scenarios need them."
        ),
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(metavar="NAME|FILE", help="Run this one only; may be given more than once.")
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="List the scenarios and exit.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of results and report. Default: benchmarks/results/bench-cpu or -gpu.")
    ] = None,
    study: Annotated[
        Path | None, typer.Option(help="CT study to send in place of a phantom, where a scenario reads from disk.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke test: every load is tiny, nothing is judged.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a threshold is missed.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out what has a result in the folder already.")
    ] = False,
    repository: Repository = DEFAULT_REPOSITORY,
) -> None:
    """Measure the whole stack and write a report: throughput, latency, memory, peers."""
    with extra("bench"):
        from groundglass_bench.host import describe_host, find_gpu
        from groundglass_bench.report import write_report
        from groundglass_bench.running import check_before, plan_run, run, without_measured
        from groundglass_bench.scenario import choose_scenarios
        from groundglass_bench.serving import Surroundings

    scenarios = choose_scenarios(scenario or (), quick=quick)
    if list_them:
        for entry in scenarios:
            print(f"{entry.name:18} {entry.summary}")
        return
    plan = plan_run(scenarios, server, asked=bool(scenario))
    _require_study(study)
    on_gpu = any(repository.glob("unet/*/model.plan")) and find_gpu() is not None
    folder = out or (QUICK_RESULTS if quick else RESULTS / f"bench-{'gpu' if on_gpu else 'cpu'}")
    if resume:
        plan = without_measured(plan, folder)
    with tempfile.TemporaryDirectory(prefix="groundglass-bench-") as scratch:
        around = Surroundings(
            repository=repository,
            config_name=None if on_gpu else EMBEDDED_CONFIG,
            server=server,
            study=study,
            scratch=Path(scratch),
            open_torch=_open_torch,
            open_plan=_open_plan,
            tell=_tell,
        )
        check_before(plan, around, folder)
        try:
            results = run(plan, around, folder, describe_host(around.threads, on_gpu))
        except KeyboardInterrupt:
            write_report(folder, plan.left_out)  # of what was measured so far: --resume goes on
            raise
    report = write_report(folder, plan.left_out)
    _conclude(results, report, strict=strict)


def _conclude(results: Iterable[ScenarioResult], report: Path, *, strict: bool) -> None:
    """Verdicts and the report's place on stdout; what failed on stderr, and in the exit code."""
    failed = {result.scenario: result.error for result in results if result.error is not None}
    missed = [result.scenario for result in results if result.missed]
    for result in results:
        for judged in result.judgements:
            value = "" if judged.value is None else f"{judged.value:.4g} "
            print(f"{result.scenario}: {judged.threshold.figure} {value}({judged.threshold}): {judged.word}")
    print(f"report: {report}")
    for name, reason in failed.items():
        print(f"groundglass: scenario {name} failed: {reason}", file=sys.stderr)
    if strict and missed:
        print(f"groundglass: thresholds missed: {', '.join(missed)}", file=sys.stderr)
    if failed or (strict and missed):
        raise typer.Exit(1)


def _require_study(study: Path | None) -> None:
    if study is not None and not study.exists():
        raise SettingError(f"--study {study}: no such file or folder")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _open_torch() -> RunNetwork:
    """The shipped checkpoint in eager torch, preprocess included."""
    files = sorted(WEIGHTS.glob("*.safetensors"))
    if not files:
        raise SettingError(f"no weights in {WEIGHTS}: the checkpoint is expected there")
    with extra("export"):
        import torch

        from groundglass_export.checkpoint import load_checkpoint
        from groundglass_export.graphs import Preprocess, ServedUnet, grey_network
    checkpoint = load_checkpoint(files[-1])
    preprocess, network = Preprocess(), ServedUnet(grey_network(checkpoint), checkpoint.calibration).eval()
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    @torch.inference_mode()
    def run(hu: NDArray[np.int16]) -> object:
        return network(preprocess(torch.from_numpy(hu)))

    return run


def _open_plan(path: Path) -> Mapping[str, BareEngine]:
    """A TensorRT plan on this machine's GPU, images in its memory, at the batch sizes that it takes."""
    with extra("export"):
        import torch

        from groundglass_export.plan_engine import PlanEngine
    engine = PlanEngine(path)
    smallest, largest = engine.batches
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    batches = [batch for batch in _PLAN_BATCHES if smallest <= batch <= largest] or [largest]
    return {f"{engine.runtime}, batch {batch}": _plan_rate(engine, stream, batch) for batch in batches}


def _plan_rate(engine: Any, stream: Any, batch: int) -> Callable[[float], float]:
    def rate(seconds: float) -> float:
        bound = engine.bind(batch)
        for _ in range(2):  # the first run allocates
            bound.enqueue(stream)
            stream.synchronize()
        runs, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(_PLAN_RUNS):
                bound.enqueue(stream)
            stream.synchronize()
            runs += _PLAN_RUNS
        return batch * runs / (time.perf_counter() - started)

    return rate
