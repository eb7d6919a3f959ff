"""What it takes to read DICOM, by transfer syntax: headers, and decoding in one thread, in threads, in processes.

    python benchmarks/decoders.py --out benchmarks/results/

A phantom is written in each syntax, or a study is given. The ways to decode take turns; each is measured by the clock
(slices a second) and in CPU time, which is what inference on the same cores loses.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from groundglass.errors import GroundglassError, SettingError
from groundglass.publish import published
from groundglass.study import SliceSource, Study
from groundglass_bench.host import describe_host
from groundglass_bench.rounds import HostClock, Rate, Rounds, measure
from groundglass_client.intake import decode_hu, open_study
from groundglass_client.phantom import SYNTAXES, PhantomSettings, write_phantom

NAME = "decoders"
HEADERS = "headers"
DECODERS = ("imagecodecs", "pydicom")

app = typer.Typer(add_completion=False)

Work = Callable[[], float]
"""Reads all slices. Returns the CPU seconds of every thread and process that took part."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one study: by way of reading, slices a second by the clock, and slices per second of CPU time."""

    slices: int
    by_clock: Mapping[str, Rate]
    by_cpu: Mapping[str, Rate]


class CpuClock:
    """For works that return their CPU seconds."""

    def seconds(self, work: Callable[[], Any], times: int) -> float:
        """See :class:`groundglass_bench.rounds.Clock`."""
        return float(sum(work() for _ in range(times)))


@app.command()
def decoders(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/results"),
    study: Annotated[Path | None, typer.Option(help="Measure this study instead of phantoms.")] = None,
    syntax: Annotated[
        list[str] | None, typer.Option(help="Phantoms in this syntax only; may be given more than once.")
    ] = None,
    slices: Annotated[int, typer.Option(help="Slices of a phantom, or of a study, from the head, at most.")] = 32,
    workers: Annotated[int, typer.Option(help="Threads and processes; 0 is the number of cores.")] = 0,
    repetitions: Annotated[int, typer.Option(help="Rounds; the median is reported.")] = 5,
    min_seconds: Annotated[float, typer.Option(help="What one repetition lasts at least.")] = 0.3,
) -> None:
    """Measure decoders in turns.

    Example: python benchmarks/decoders.py --syntax jpeg-lossless --slices 64
    """
    if workers < 0 or slices < 1:
        raise SettingError("--workers can't be negative, and --slices must be 1 or more")
    rounds = Rounds((), repetitions, min_seconds)
    workers = workers or len(os.sched_getaffinity(0))
    host = describe_host(workers, on_gpu=False)
    host["versions"] |= {package: importlib.metadata.version(package) for package in DECODERS}
    found = {name: measure_study(path, slices, workers, rounds) for name, path in _studies(study, syntax, slices)}
    command = shlex.join(["python", "benchmarks/decoders.py", *sys.argv[1:]])
    text = markdown(command, host, found)
    report = {"command": command, "host": host, "studies": {name: asdict(figures) for name, figures in found.items()}}
    for path, content in {f"{NAME}.json": json.dumps(report, indent=2) + "\n", f"{NAME}.md": text}.items():
        with published(out / path) as beside:
            beside.write_text(content, encoding="utf-8")
    typer.echo(text)
    typer.echo(f"written: {out / NAME}.json, {out / NAME}.md", err=True)


def _studies(study: Path | None, syntaxes: Sequence[str] | None, slices: int) -> Iterator[tuple[str, Path]]:
    """The studies to measure, by name, each as long as its turn lasts."""
    if study is not None:
        yield study.name, study
        return
    wanted = syntaxes or list(SYNTAXES)
    if unknown := [name for name in wanted if name not in SYNTAXES]:
        raise SettingError(f"--syntax {unknown[0]}: unknown; known are {', '.join(SYNTAXES)}")
    for name in wanted:
        typer.echo(f"measuring {name}", err=True)
        with TemporaryDirectory(prefix="groundglass-") as folder:
            yield name, write_phantom(PhantomSettings(slices=slices, syntax=name), Path(folder) / name)


def measure_study(path: Path, slices: int, workers: int, rounds: Rounds) -> Measured:
    """Raises UnreadableFile and NoSeries for a path that holds no study."""
    with open_study(path) as opened:
        sources = opened.slices[:slices]
        with decoding(sources, workers) as works:
            by_clock = measure(works, len(sources), rounds, HostClock())
            by_cpu = measure(works, len(sources), rounds, CpuClock())
    headers: dict[str, Work] = {HEADERS: lambda: _cpu_seconds(lambda: _open(path))}
    read = _file_count(opened)
    return Measured(
        len(sources),
        measure(headers, read, rounds, HostClock()) | by_clock,
        measure(headers, read, rounds, CpuClock()) | by_cpu,
    )


def _open(path: Path) -> None:
    with open_study(path):
        pass


def _file_count(study: Study) -> int:
    left_out = (*study.duplicates, *study.refused, *study.ignored)
    return len(study.slices) + len(left_out) + sum(series.slice_count for series in study.other_series)


@contextmanager
def decoding(sources: Sequence[SliceSource], workers: int) -> Iterator[dict[str, Work]]:
    """The ways to decode, their threads and processes started. Processes send the pixels back as a pool does."""
    spawned = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ThreadPoolExecutor(workers) as threads, ProcessPoolExecutor(workers, mp_context=spawned) as processes:
        spent: dict[int, float] = {}
        yield {
            "1 thread": lambda: _cpu_seconds(lambda: [decode_hu(source) for source in sources]),
            f"{workers} threads": lambda: _cpu_seconds(lambda: list(threads.map(decode_hu, sources))),
            f"{workers} processes": lambda: _in_processes(processes, sources, spent),
        }


def _cpu_seconds(work: Callable[[], object]) -> float:
    """Of all threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _in_processes(pool: ProcessPoolExecutor, sources: Sequence[SliceSource], spent: dict[int, float]) -> float:
    """``spent`` keeps the CPU seconds of every process so far, between the calls."""
    before = sum(spent.values())
    start = time.process_time()
    for process, seconds, _ in pool.map(_decode_there, sources):
        spent[process] = max(seconds, spent.get(process, 0.0))
    return time.process_time() - start + sum(spent.values()) - before


def _decode_there(source: SliceSource) -> tuple[int, float, NDArray[np.int16]]:
    hu = decode_hu(source)
    return os.getpid(), time.process_time(), hu


def markdown(command: str, host: Mapping[str, Any], found: Mapping[str, Measured]) -> str:
    """For people."""
    ways = [way for way in next(iter(found.values())).by_clock if way != HEADERS]
    versions = ", ".join(f"{package} {version}" for package, version in host["versions"].items())
    lines = [
        "# Reading DICOM",
        "",
        f"`{command}`",
        "",
        f"- {host['date']}, commit {host['commit']}, Python {host['python']}, {host['system']}",
        f"- {host['processor']}, {host['cores']} cores",
        f"- {versions}",
        "",
        "Header: CPU ms a slice. Ways to decode, from disk to Hounsfield units: slices/s (CPU ms a slice). Medians.",
        "",
        f"| study | slices | header | {' | '.join(ways)} |",
        "|---|---" + "|---" * (1 + len(ways)) + "|",
    ]
    for name, figures in found.items():
        cells = [f"{figures.by_clock[way].median:,.0f} ({_cpu_ms(figures.by_cpu[way])})" for way in ways]
        lines.append(f"| {name} | {figures.slices} | {_cpu_ms(figures.by_cpu[HEADERS])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cpu_ms(rate: Rate) -> str:
    return f"{1000 / rate.median:.2f}"


def main() -> None:
    """Run, and tell what Groundglass raises on purpose in one line."""
    try:
        app(standalone_mode=True)
    except GroundglassError as error:
        sys.exit(f"decoders.py: {error}")


if __name__ == "__main__":
    main()
