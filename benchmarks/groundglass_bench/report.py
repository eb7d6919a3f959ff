"""The report: all results of a folder as Markdown with plots for people, and as JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from groundglass.errors import SettingError
from groundglass.publish import published
from groundglass_bench.figures import Figure
from groundglass_bench.plots import write_plots
from groundglass_bench.result import REPORT_NAME, Judgement, ScenarioResult, Table, read_results

REPORT_FORMAT: Final = "groundglass bench report 1"
_TITLE: Final = "# Benchmark of the whole stack"


def write_report(folder: Path, left_out: Mapping[str, str]) -> Path:
    """Write ``report.md``, ``report.json`` and ``plots/`` from all results in ``folder``. Returns ``report.md``.

    ``left_out`` says why scenarios were not run.
    """
    results = read_results(folder)
    text = folder / f"{REPORT_NAME}.md"
    try:
        plots = write_plots(results, folder / "plots")
        contents = {
            folder / f"{REPORT_NAME}.json": json.dumps(_to_json(results, left_out), indent=2) + "\n",
            text: markdown(
                results, left_out, {name: [_link(path, folder) for path in found] for name, found in plots.items()}
            ),
        }
        for path, content in contents.items():
            with published(path) as beside:
                beside.write_text(content, encoding="utf-8")
    except OSError as error:
        raise SettingError(f"the report in {folder} can't be written: {error.strerror}") from error
    return text


def markdown(results: Sequence[ScenarioResult], left_out: Mapping[str, str], plots: Mapping[str, Sequence[str]]) -> str:
    """A summary of every threshold, then a section for each scenario. ``plots`` are links by scenario."""
    lines = [_TITLE, "", *_hosts(results), "", *_summary(results, left_out)]
    for result in results:
        lines += ["", *_section(result, plots.get(result.scenario, ()))]
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """A number as a person wants it: three digits that count, and no decimals from 100 on."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def _to_json(results: Sequence[ScenarioResult], left_out: Mapping[str, str]) -> dict[str, Any]:
    scenarios = []
    for result in results:
        content = asdict(result)
        if result.measured is not None:
            content["measured"]["figures"] = [figure.to_json() for figure in result.measured.figures]
        scenarios.append(content)
    return {"format": REPORT_FORMAT, "scenarios": scenarios, "left_out": dict(left_out)}


def _hosts(results: Sequence[ScenarioResult]) -> Iterator[str]:
    """Machine and versions, once where all results share them."""
    told: list[str] = []
    for result in results:
        host = result.host
        gpu = host.get("gpu")
        where = (
            f"{host['processor']}, {host['cores']} cores" + (f", {gpu['name']}" if gpu else "") + f", {host['system']}"
        )
        versions = ", ".join(f"{package} {version}" for package, version in host["versions"].items())
        line = f"- {where}, Python {host['python']}; {versions}"
        if line not in told:
            told.append(line)
            yield line
    yield "- median of the repetitions (smallest to largest); ratios are of repetitions in the same round"


def _summary(results: Sequence[ScenarioResult], left_out: Mapping[str, str]) -> Iterator[str]:
    yield "| scenario | figure | median (spread) | threshold | verdict | measured |"
    yield "|---|---|---|---|---|---|"
    for result in results:
        when = f"{result.host['date']}, {result.host['commit']}"
        if result.error is not None:
            yield f"| {result.scenario} | | | | failed: {_cell(result.error)} | {when} |"
        for judged in result.judgements:
            threshold, figure = judged.threshold, result.figure(judged.threshold.figure)
            shown = _spread(figure) if figure else ""
            yield f"| {result.scenario} | {threshold.figure} | {shown} | {threshold} | {_word(judged)} | {when} |"
    for name, reason in left_out.items():
        yield f"| {name} | | | | left out: {_cell(reason)} | |"


def _section(result: ScenarioResult, plots: Sequence[str]) -> Iterator[str]:
    yield f"## {result.scenario}{' (quick)' if result.quick else ''}"
    yield ""
    yield result.summary
    yield ""
    load = ", ".join(f"{name} {_setting(value)}" for name, value in result.settings.items())
    yield f"- {result.kind}: {load}"
    yield f"- server: {result.server}; {result.started}, {result.seconds:.0f} s"
    if result.measured is None:
        yield f"- failed: {result.error}"
        return
    yield from (f"- {note}" for note in result.measured.notes)
    yield from (f"- not measured: {what}: {reason}" for what, reason in result.measured.absent.items())
    yield ""
    yield "| figure | median (spread) | repetitions |"
    yield "|---|---|---|"
    for figure in result.measured.figures:
        yield f"| {figure.name} | {_spread(figure)} | {len(figure.values)} |"
    for table in result.measured.tables:
        yield from ("", *_table(table))
    for plot in plots:
        yield from ("", f"![{result.scenario}]({plot})")


def _table(table: Table) -> Iterator[str]:
    yield f"{table.title}:"
    yield ""
    yield f"| {' | '.join(table.columns)} |"
    yield "|---" * len(table.columns) + "|"
    for row in table.rows:
        yield f"| {' | '.join(_cell(str(cell)) for cell in row)} |"


def _spread(figure: Figure) -> str:
    unit = f" {figure.unit}" if figure.unit else ""
    if len(figure.values) == 1:
        return f"{number(figure.median)}{unit}"
    return f"{number(figure.median)}{unit} ({number(figure.smallest)} to {number(figure.largest)})"


def _word(judged: Judgement) -> str:
    return f"**{judged.word}**" if judged.word in ("missed", "not measured") else judged.word


def _setting(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _link(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
