"""A run: scenarios one after the other, each result on disk before the next begins."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from groundglass.errors import GroundglassError, RepositoryError, SettingError
from groundglass_bench.kinds import KINDS
from groundglass_bench.networks import CONFIG_NAME
from groundglass_bench.result import Judgement, Measured, ScenarioResult, judge, one_line, read_results, write_result
from groundglass_bench.scenario import Scenario
from groundglass_bench.serving import Surroundings, require_answer
from groundglass_ensemble.repository import check_repository, find_problems

log = logging.getLogger(__name__)

_CONTACT_S: Final = 10.0
_LOOPBACK: Final = re.compile(r"(localhost|127\.[\d.]+|\[::1\]):\d+")


@dataclass(frozen=True, slots=True)
class Plan:
    """What will run, and why the rest won't."""

    scenarios: tuple[Scenario, ...]
    left_out: Mapping[str, str]


def plan_run(scenarios: Sequence[Scenario], server: str | None, *, asked: bool) -> Plan:
    """The scenarios that make sense. ``asked`` says that the user named them.

    Raises SettingError when a named one can't run against the user's server, or nothing is left.
    """
    refused = {scenario.name: reason for scenario in scenarios if (reason := _refusal(scenario, server, asked=asked))}
    if asked and refused:
        name, reason = next(iter(refused.items()))
        raise SettingError(f"--scenario {name} {reason}")
    left = tuple(scenario for scenario in scenarios if scenario.name not in refused)
    if not left:
        raise SettingError("no scenario is left to run")
    return Plan(left, refused)


def without_measured(plan: Plan, out: Path) -> Plan:
    """``plan`` less what has a result in ``out`` already that was no failure and just as quick."""
    done = {(result.scenario, result.quick) for result in read_results(out) if result.error is None}
    left = tuple(scenario for scenario in plan.scenarios if (scenario.name, scenario.quick) not in done)
    return Plan(left, plan.left_out)


def check_before(plan: Plan, around: Surroundings, out: Path) -> None:
    """Raise, with one line, for whatever would keep the run from being worth its time: before anything is booted."""
    read_results(out)
    if around.server is not None:
        if "," in around.server:
            raise SettingError(f"--server {around.server}: one server at a time is measured")
        require_answer(around.server, _CONTACT_S)
    kinds = [KINDS[scenario.kind] for scenario in plan.scenarios]
    if around.server is None and any(kind.real_network for kind in kinds):
        check_repository(around.repository, around.config_name)
    elif around.server is None and (problems := find_problems(around.repository, CONFIG_NAME, model_files=False)):
        raise RepositoryError(f"{around.repository} can't be served: " + "; ".join(problems))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"--out {out}: no folder can be made there ({error.strerror})") from error


def run(plan: Plan, around: Surroundings, out: Path, host: Mapping[str, Any]) -> list[ScenarioResult]:
    """Run what is planned; a scenario that fails is a result with its error, and the next one runs."""
    results = []
    for number, scenario in enumerate(plan.scenarios, 1):
        around.tell(f"{scenario.name} ({number} of {len(plan.scenarios)}): {scenario.summary}")
        result = _run(scenario, around, host)
        write_result(result, out)
        around.tell(f"{scenario.name}: {_outcome(result)}, {result.seconds:.0f} s")
        results.append(result)
    return results


def _run(scenario: Scenario, around: Surroundings, host: Mapping[str, Any]) -> ScenarioResult:
    started, clock = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    measured: Measured | None = None
    judgements: tuple[Judgement, ...] = ()
    reason: str | None = None
    try:
        measured = KINDS[scenario.kind].measure(scenario.load, around)
        judgements = judge(measured, scenario.thresholds, quick=scenario.quick)
    except Exception as error:  # one failing scenario must not lose the others
        log.info("%s failed", scenario.name, exc_info=True)
        reason = (
            one_line(error) if isinstance(error, GroundglassError) else f"{type(error).__name__}: {one_line(error)}"
        )
    return ScenarioResult(
        scenario=scenario.name,
        kind=scenario.kind,
        summary=scenario.summary,
        settings=scenario.settings,
        quick=scenario.quick,
        host=host,
        server=around.server or "embedded",
        started=started,
        seconds=time.monotonic() - clock,
        measured=measured,
        judgements=judgements,
        error=reason,
    )


def _refusal(scenario: Scenario, server: str | None, *, asked: bool) -> str | None:
    """Why a scenario can't run against the user's server."""
    if server is None:
        return None
    needs = KINDS[scenario.kind].given_server
    if needs == "own":
        return "needs a network of its own, which --server can't be given: run it without"
    if needs == "local" and not _LOOPBACK.fullmatch(server):
        return "compares with the bare engine on this machine: run it where the server runs"
    if needs == "asked" and not asked:
        return "offers more than the server can take: name it with --scenario if that is what you want"
    return None


def _outcome(result: ScenarioResult) -> str:
    if result.error is not None:
        return f"failed: {result.error}"
    return "; ".join(f"{judged.threshold.figure} {judged.word}" for judged in result.judgements) or "measured"
