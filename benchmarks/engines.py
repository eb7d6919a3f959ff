"""Slices a second of bare engines, all in one run: the figure that a server's throughput is held against.

    python benchmarks/engines.py --checkpoint export/weights/groundglass_unet.safetensors --out benchmarks/results/

On a machine with a GPU the GPU's engines are measured, elsewhere the CPU's: the engines take turns, and what can't run
here is listed with the reason.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from arithmetic import known_peak, macs_per_slice
from contenders import Absent, Contender, Models, Prepare, open_contender
from engine_report import Measurement, markdown, write_report
from groundglass.errors import GroundglassError, SettingError
from groundglass.manifest import file_digest
from groundglass_bench.host import describe_host
from groundglass_bench.rounds import Clock, CudaClock, HostClock, Rate, Rounds, measure
from groundglass_export.graph_types import one_line

CPU_BATCHES = (1, 8)
GPU_BATCHES = (1, 8, 16, 32)

app = typer.Typer(add_completion=False)


@app.command()
def engines(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights: torch's engines, and graphs that are not given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/results"),
    fp32: Annotated[Path | None, typer.Option(help="FP32 ONNX; made from the checkpoint by default.")] = None,
    int8: Annotated[Path | None, typer.Option(help="INT8 ONNX.")] = None,
    fp16: Annotated[Path | None, typer.Option(help="FP16 ONNX; made from the FP32 one by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, gpu, or auto.")] = "auto",
    engine: Annotated[
        list[str] | None, typer.Option(help="Measure this one only; may be given more than once.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Slices at once; may be given more than once.")] = None,
    repetitions: Annotated[int, typer.Option(help="Rounds; the median is reported.")] = 5,
    min_seconds: Annotated[float, typer.Option(help="What one repetition lasts at least.")] = 1.0,
    threads: Annotated[int, typer.Option(help="Threads of every CPU engine; 0 is the number of cores.")] = 0,
    peak_tflops: Annotated[float | None, typer.Option(help="Arithmetic peak of the device, dense, in TFLOP/s.")] = None,
    compile_mode: Annotated[str, typer.Option(help="Mode of torch.compile.")] = "default",
) -> None:
    """Measure bare engines in turns.

    Example: python benchmarks/engines.py --checkpoint export/weights/groundglass_unet.safetensors --int8 unet-int8.onnx
    """  # fmt: skip
    on_gpu = _uses_gpu(device)
    contenders = _chosen(engine, on_gpu)
    rounds = Rounds(tuple(batch or (GPU_BATCHES if on_gpu else CPU_BATCHES)), repetitions, min_seconds)
    files = _given({"checkpoint": checkpoint, "fp32": fp32, "int8": int8, "fp16": fp16})
    if threads < 0 or (peak_tflops is not None and peak_tflops <= 0):
        raise SettingError("--threads can't be negative, and --peak-tflops must be more than 0")
    models = Models(
        files, threads or len(os.sched_getaffinity(0)), compile_mode=compile_mode, largest_batch=max(rounds.batches)
    )
    host = describe_host(models.threads, on_gpu)
    rates, absent = _measure(models, contenders, rounds, CudaClock(models.stream) if on_gpu else HostClock())
    if not rates:
        raise SettingError("no engine can run here: " + "; ".join(f"{name}: {why}" for name, why in absent.items()))
    measurement = Measurement(
        command=shlex.join(["python", "benchmarks/engines.py", *sys.argv[1:]]),
        host=host,
        files={role: {"file": path.name, "sha256": file_digest(path)} for role, path in files.items()},
        macs=macs_per_slice(models.fp32_graph),
        peak_tflops=peak_tflops or (known_peak(host["gpu"]["name"]) if on_gpu else None),
        rates=rates,
        absent=absent,
    )
    paths = write_report(measurement, out)
    typer.echo(markdown(measurement))
    typer.echo(f"written: {paths[0]}, {paths[1]}", err=True)


def _measure(
    models: Models, contenders: dict[str, Contender], rounds: Rounds, clock: Clock
) -> tuple[dict[str, dict[int, Rate]], dict[str, str]]:
    """Rates by engine and batch, and reasons by what is missing."""
    opened: dict[str, Prepare] = {}
    absent: dict[str, str] = {}
    for name, contender in contenders.items():
        typer.echo(f"opening {name}", err=True)
        try:
            opened[name] = open_contender(contender, models)
        except Absent as reason:
            absent[name] = str(reason)
    rates: dict[str, dict[int, Rate]] = {}
    for size in rounds.batches:
        works = {}
        for name, prepare in opened.items():
            try:
                works[name] = prepare(size)
                works[name]()
            except Exception as error:  # one engine's memory is full: the others are measured
                works.pop(name, None)
                absent[f"{name}, batch {size}"] = one_line(error)
        typer.echo(f"batch {size}: {', '.join(works)}", err=True)
        for name, rate in measure(works, size, rounds, clock).items():
            rates.setdefault(name, {})[size] = rate
    return rates, absent


def _uses_gpu(device: str) -> bool:
    if device not in ("auto", "cpu", "gpu"):
        raise SettingError(f"--device {device}: expected cpu, gpu or auto")
    if device == "cpu":
        return False
    try:
        import torch
    except ImportError:
        found = False
    else:
        found = torch.cuda.is_available()
    if device == "gpu" and not found:
        raise SettingError("--device gpu: torch finds no GPU on this machine")
    return found


def _chosen(asked: list[str] | None, on_gpu: bool) -> dict[str, Contender]:
    if on_gpu:
        from gpu_engines import ENGINES
    else:
        from cpu_engines import ENGINES
    if unknown := [name for name in asked or () if name not in ENGINES]:
        where = "GPU" if on_gpu else "CPU"
        raise SettingError(f"--engine {unknown[0]}: unknown on a {where}; known are {', '.join(ENGINES)}")
    return {name: contender for name, contender in ENGINES.items() if not asked or name in asked}


def _given(files: dict[str, Path | None]) -> dict[str, Path]:
    found = {role: path for role, path in files.items() if path is not None}
    for role, path in found.items():
        if not path.is_file():
            raise SettingError(f"--{role} {path}: no such file")
    if not {"checkpoint", "fp32"} & found.keys():
        raise SettingError("nothing to measure: give --checkpoint, or --fp32 with an ONNX file")
    return found


def main() -> None:
    """Run, and tell what Groundglass raises on purpose in one line."""
    try:
        app(standalone_mode=True)
    except GroundglassError as error:
        sys.exit(f"engines.py: {error}")


if __name__ == "__main__":
    main()
