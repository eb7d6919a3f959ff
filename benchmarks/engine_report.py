"""What was measured, as JSON for machines and as Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arithmetic import limit_slices_per_s
from groundglass.publish import published
from groundglass_bench.rounds import Rate

NAME = "engines"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One call of the script. ``rates`` is by engine and batch size, ``absent`` says why an engine was not measured.

    ``macs`` is multiply-adds a slice, ``peak_tflops`` what the device can do, None where nobody knows.
    """

    command: str
    host: Mapping[str, Any]
    files: Mapping[str, Any]
    macs: int
    peak_tflops: float | None
    rates: Mapping[str, Mapping[int, Rate]]
    absent: Mapping[str, str]

    @property
    def limit(self) -> float | None:
        """Slices a second if arithmetic were all."""
        return None if self.peak_tflops is None else limit_slices_per_s(self.macs, self.peak_tflops)

    @property
    def reference(self) -> str:
        """The engine that the others are compared with: the first measured."""
        return next(iter(self.rates))

    def as_dict(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "command": self.command,
            "host": dict(self.host),
            "files": dict(self.files),
            "macs_per_slice": self.macs,
            "peak_tflops": self.peak_tflops,
            "limit_slices_per_s": self.limit,
            "slices_per_s": {
                name: {str(batch): self._figures(name, batch) for batch in by_batch}
                for name, by_batch in self.rates.items()
            },
            "absent": dict(self.absent),
        }

    def _figures(self, name: str, batch: int) -> dict[str, Any]:
        rate = self.rates[name][batch]
        reference = self.rates[self.reference].get(batch)
        return {
            **asdict(rate),
            "spread": rate.spread,
            "times_reference": rate.median / reference.median if reference else None,
            "share_of_limit": rate.median / self.limit if self.limit else None,
        }


def markdown(measurement: Measurement) -> str:
    """Tables of slices a second, ratios and shares of the limit, and what is needed to trust them."""
    host, found = measurement.host, measurement.as_dict()
    gpu = host["gpu"]
    lines = [
        "# Bare engines",
        "",
        f"`{measurement.command}`",
        "",
        f"- {host['date']}, commit {host['commit']}, Python {host['python']}, {host['system']}",
        f"- {host['processor']}, {host['cores']} cores, {host['threads']} threads"
        + (f"; {gpu['name']} (compute capability {gpu['compute_capability']}), CUDA {gpu['cuda']}" if gpu else ""),
        "- " + ", ".join(f"{package} {version}" for package, version in host["versions"].items()),
        f"- {measurement.macs / 1e9:.1f} GMAC a slice, counted from the graph"
        + (f"; at {measurement.peak_tflops:g} TFLOP/s no more than {measurement.limit:,.0f} slices/s"
           if measurement.limit else ""),
        "",
        f"Slices/s: median of the repetitions (spread), times {measurement.reference} in the same run"
        + (", share of the arithmetic limit." if measurement.limit else "."),
        "",
    ]  # fmt: skip
    batches = sorted({batch for by_batch in measurement.rates.values() for batch in by_batch})
    lines += [f"| engine | {' | '.join(f'batch {batch}' for batch in batches)} |", "|---" * (len(batches) + 1) + "|"]
    for name, by_batch in found["slices_per_s"].items():
        lines.append(f"| {name} | {' | '.join(_cell(by_batch.get(str(batch))) for batch in batches)} |")
    if measurement.absent:
        lines += ["", "Not measured:", "", *(f"- {name}: {reason}" for name, reason in measurement.absent.items())]
    return "\n".join(lines) + "\n"


def write_report(measurement: Measurement, folder: Path) -> tuple[Path, Path]:
    """Write ``engines-<cpu or gpu>.json`` and ``.md`` into ``folder``; a file appears whole or not at all."""
    stem = f"{NAME}-{'gpu' if measurement.host['gpu'] else 'cpu'}"
    contents = {
        folder / f"{stem}.json": json.dumps(measurement.as_dict(), indent=2) + "\n",
        folder / f"{stem}.md": markdown(measurement),
    }
    for path, text in contents.items():
        with published(path) as beside:
            beside.write_text(text, encoding="utf-8")
    first, second = contents
    return first, second


def _cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    share = f", {figures['share_of_limit']:.0%}" if figures["share_of_limit"] is not None else ""
    ratio = f", {figures['times_reference']:.2f}x" if figures["times_reference"] is not None else ""
    rate = f"{figures['median']:,.0f}" if figures["median"] >= 100 else f"{figures['median']:.2f}"
    return f"{rate} (±{figures['spread'] / 2:.0%}){ratio}{share}"
