"""The benchmark's values: scenarios and their refusals, figures, server statistics, results, the report."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundglass.errors import ServerError, SettingError
from groundglass_bench.figures import Figure, bracketed_ratios, paired_ratios, take_turns
from groundglass_bench.report import number, write_report
from groundglass_bench.result import (
    Chart,
    Line,
    Measured,
    ScenarioResult,
    Table,
    judge,
    read_results,
    write_result,
)
from groundglass_bench.scenario import Threshold, built_in, choose_scenarios, read_scenario
from groundglass_bench.server_statistics import ModelTimes, difference, stage_table
from groundglass_bench.settings import SETTINGS, Ceiling
from groundglass_bench.studies import decoded, memory_study, opened_repeated, repeated_study, study_folder

HOST = {
    "date": "2026-01-02",
    "commit": "0123456789ab",
    "python": "3.11.0",
    "system": "Linux x86_64",
    "processor": "a processor",
    "cores": 2,
    "threads": 2,
    "gpu": None,
    "versions": {"numpy": "1.26.4"},
}
SCENARIO = """
kind = "ceiling"
summary = "a summary"
[load]
slices = 100
[thresholds]
grpc = { at_least = 600 }
[quick]
slices = 8
"""


def scenario_file(folder: Path, text: str = SCENARIO, name: str = "mine.toml") -> Path:
    """A scenario of a user's own."""
    file = folder / name
    file.write_text(text)
    return file


def result(name: str = "one", **changes: object) -> ScenarioResult:
    """A result with a threshold kept and one missed."""
    measured = Measured(
        figures=(Figure("fast", "slices/s", (700.0, 650.0, 900.0)), Figure("ratio", "", (0.9,))),
        tables=(Table("Stages", ("model", "ms"), (("unet", 1.5),)),),
        charts=(Chart("A chart", "load", "s", (Line("p50", (1.0, 2.0), (0.5, 0.7), (0.4, 0.6), (0.6, 0.8)),)),),
        absent={"a peer": "it is not installed"},
        notes=("a note",),
    )
    thresholds = (Threshold("fast", "at_least", 600.0), Threshold("ratio", "at_least", 0.97))
    made = ScenarioResult(
        scenario=name,
        kind="ceiling",
        summary="a summary",
        settings={"slices": 100},
        quick=False,
        host=HOST,
        server="embedded",
        started="2026-01-02T03:04:05+00:00",
        seconds=12.5,
        measured=measured,
        judgements=judge(measured, thresholds, quick=False),
    )
    return replace(made, **changes)


def test_every_kind_has_a_scenario_and_every_scenario_a_threshold() -> None:
    """The package's scenarios can be read, full and quick, use every kind, and each is judged by something."""
    scenarios = choose_scenarios((), quick=False)
    assert {scenario.name for scenario in scenarios} == built_in().keys()
    assert {scenario.kind for scenario in scenarios} == SETTINGS.keys()
    for scenario in scenarios:
        assert scenario.thresholds
        assert scenario.summary
        small = read_scenario(built_in()[scenario.name], quick=True)
        assert small.load != scenario.load


def test_a_full_comparison_repeats_three_times() -> None:
    """Medians are of at least three repetitions, wherever things take turns."""
    for scenario in choose_scenarios((), quick=False):
        assert scenario.settings.get("repetitions", 3) >= 3


def test_quick_takes_the_small_load(tmp_path: Path) -> None:
    """[quick] replaces values of [load], and only when asked."""
    file = scenario_file(tmp_path)
    assert read_scenario(file).load == Ceiling(slices=100)
    assert read_scenario(file, quick=True).load == Ceiling(slices=8)
    assert read_scenario(file).thresholds == (Threshold("grpc", "at_least", 600.0),)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"ceiling"', '"roof"', "kind 'roof'; known are efficiency"),
        ("slices = 100", "slices = 0", "slices is 0; expected at least 1"),
        ("slices = 100", "slices = 100\nrepetitions = 0", "repetitions is 0; expected at least 1"),
        ("slices = 100", "slices = 1.5", "slices is 1.5; expected int"),
        ("slices = 100", "slices = true", "slices is True; expected int"),
        ("slices = 100", "slices = 70000", "at most 65536"),
        ("slices = 100", "depth = 3", "unknown key depth; known are repetitions, slices, warm_up"),
        ("slices = 100", "", "missing 1 required keyword-only argument: 'slices'"),
        ("slices = 8", "slices = -8", "[quick]: slices is -8"),
        ("at_least", "about", "threshold grpc is {'about': 600}"),
        ("600", '"many"', "has the bound 'many'; expected a number"),
        ("[load]", "[loads]", "unknown key loads"),
        ('"ceiling"', "ceiling", "is no TOML"),
        (
            'kind = "ceiling"',
            'kind = "scaling_users"',
            "unknown key slice",
        ),
    ],
)
def test_a_scenario_that_measures_nothing_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    """Zero of anything, another type, an unknown key or kind: one line that names the file and the key."""
    text = SCENARIO.replace(old, new, 1)
    if "scaling_users" in text:
        text = text.replace("slices = 100", "slice = 100")
    with pytest.raises(SettingError) as refusal:
        read_scenario(scenario_file(tmp_path, text))
    assert words in str(refusal.value)
    assert "mine.toml" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "load", "words"),
    [
        ("scaling_users", "users = [1, 0]\nslices = 8\nduration_s = 1", "users is 0; expected at least 1"),
        ("scaling_users", "users = []\nslices = 8\nduration_s = 1", "expected a list of at least one number"),
        ("scaling_users", "users = [1]\nslices = 8\nduration_s = -1", "duration_s is -1; expected more than 0"),
        ("soak", "studies = 3\nslices = 8", "settled is 3 of 3 studies"),
        ("efficiency", 'slices = 8\nsyntax = "jpeg"', "syntax is 'jpeg'; known are explicit"),
        ("efficiency", "slices = 8\nbare_s = nan", "bare_s is nan; expected more than 0"),
    ],
)
def test_loads_without_users_or_duration_are_refused(tmp_path: Path, kind: str, load: str, words: str) -> None:
    """Zero users, no levels, negative durations, and a soak without an end."""
    with pytest.raises(SettingError) as refusal:
        read_scenario(scenario_file(tmp_path, f'kind = "{kind}"\n[load]\n{load}\n'))
    assert words in str(refusal.value)


def test_unknown_and_double_scenarios_are_refused(tmp_path: Path) -> None:
    """A name must be known, a file there, and a result's name unique and free."""
    with pytest.raises(SettingError, match="--scenario roof: unknown; known are ceiling"):
        choose_scenarios(["roof"], quick=False)
    with pytest.raises(SettingError, match=r"no\.toml: No such file"):
        choose_scenarios([str(tmp_path / "no.toml")], quick=False)
    with pytest.raises(SettingError, match="ceiling was given twice"):
        choose_scenarios(["ceiling", "ceiling"], quick=False)
    with pytest.raises(SettingError, match="not report"):
        read_scenario(scenario_file(tmp_path, name="report.toml"))


@given(st.lists(st.floats(0.001, 1e9), min_size=1))
def test_a_figures_median_lies_in_its_spread(values: list[float]) -> None:
    """Smallest, median and largest are in order, and survive JSON."""
    figure = Figure("any", "s", tuple(values))
    assert figure.smallest <= figure.median <= figure.largest
    assert Figure.from_json(json.loads(json.dumps(figure.to_json()))) == figure


def test_works_take_turns() -> None:
    """A, B, A, B; the warm-up's values are dropped."""
    order: list[str] = []

    def work(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = take_turns({"a": lambda: work("a"), "b": lambda: work("b")}, repetitions=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert found == {"a": (3.0, 5.0), "b": (4.0, 6.0)}


def test_ratios_are_of_neighbours() -> None:
    """A pair of one round makes a ratio; a bracketed value is held against the mean of both sides, so drift cancels."""
    assert paired_ratios((2.0, 9.0), (1.0, 3.0)) == (2.0, 3.0)
    drifting = (10.0, 12.0, 14.0)
    assert bracketed_ratios((11.0, 13.0), drifting) == (1.0, 1.0)
    with pytest.raises(ValueError, match="need 3 around them"):
        bracketed_ratios((1.0, 2.0), (1.0, 2.0))


@pytest.mark.parametrize(
    ("direction", "value", "word"),
    [
        ("at_least", 600.0, "met"),
        ("at_least", 599.0, "missed"),
        ("at_most", 600.0, "met"),
        ("at_most", 601.0, "missed"),
    ],
)
def test_a_threshold_has_a_direction(direction: str, value: float, word: str) -> None:
    """The bound itself is kept; beyond it on the wrong side is missed; a quick run is not judged."""
    measured = Measured((Figure("speed", "", (value,)),))
    threshold = Threshold("speed", direction, 600.0)
    assert judge(measured, (threshold,), quick=False)[0].word == word
    assert judge(measured, (threshold,), quick=True)[0].word == "not judged (quick)"
    (unknown,) = judge(measured, (replace(threshold, figure="other"),), quick=False)
    assert (unknown.word, unknown.value) == ("not measured", None)


def test_statistics_are_differences_by_model() -> None:
    """What a model did between two readings, and what that is for a slice."""
    zero = {field.name: 0 for field in fields(ModelTimes)}
    before = {"unet": ModelTimes(**{**zero, "slices": 8, "executions": 1, "infer_ms": 100.0})}
    after = {"unet": ModelTimes(**{**zero, "slices": 24, "executions": 3, "infer_ms": 420.0, "queue_ms": 32.0})}
    spent = difference(before, after)
    assert (spent["unet"].slices, spent["unet"].infer_ms) == (16, 320.0)
    (row,) = stage_table(spent).rows
    assert row == ("unet", 16, 8.0, 2.0, 0.0, 20.0, 0.0)


def test_counters_that_fall_are_an_error() -> None:
    """A server that was restarted in between has measured nothing."""
    busy = ModelTimes(8, 1, 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ServerError, match="restarted"):
        difference({"unet": busy}, {"unet": replace(busy, slices=2)})


def test_a_model_that_did_nothing_has_a_row() -> None:
    """No slices is no division by zero."""
    assert stage_table({"unet": ModelTimes(0, 0, 0.0, 0.0, 0.0, 0.0)}).rows == (("unet", 0, 0.0, 0.0, 0.0, 0.0, 0.0),)


@given(slices=st.integers(1, 50), files=st.integers(1, 12))
def test_a_repeated_study_has_the_length_asked_for(slices: int, files: int) -> None:
    """Indices run from 0 without a gap, and every file is used as often as any other, give or take one."""
    study, _ = memory_study(files, side=8)
    made = repeated_study(study, slices)
    assert [source.index for source in made.slices] == list(range(slices))
    uses = [sum(source.file == f"slice {number}" for source in made.slices) for number in range(files)]
    assert max(uses) - min(uses) <= 1
    assert made.series.slice_count == slices


def test_a_study_on_disk_is_repeated_and_decoded(tmp_path: Path) -> None:
    """Two files make five slices, whose decoded pixels are those of their files."""
    folder = study_folder(None, tmp_path, 2, "explicit")
    assert study_folder(None, tmp_path, 2, "explicit") == folder
    with opened_repeated(folder, 5) as study:
        decode = decoded(study)
        first, second, third = (decode(source) for source in study.slices[:3])
    assert len(study.slices) == 5
    assert (first == third).all()
    assert (first != second).any()


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    """What was measured is read as it was written; hidden files and the report are no results."""
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / ".half.json").write_text("{")
    one, two = result("one"), result("two", measured=None, judgements=(), error="the server ended")
    write_result(two, tmp_path)
    write_result(one, tmp_path)
    assert read_results(tmp_path) == [one, two]
    assert read_results(tmp_path / "none") == []


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "another"}', '{"format": "groundglass bench result 1"}'])
def test_a_foreign_file_among_results_is_refused(tmp_path: Path, text: str) -> None:
    """JSON that is no result is never taken for one, and never silently left out."""
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(SettingError, match=r"other\.json is no result"):
        read_results(tmp_path)


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    """Figures with their spread, verdicts, machine, commit, failures, what is absent, and plots that are there."""
    write_result(result("one"), tmp_path)
    write_result(result("two", measured=None, judgements=(), error="the server | ended"), tmp_path)
    file = write_report(tmp_path, {"three": "needs a network of its own"})
    text = file.read_text()
    assert "| one | fast | 700 slices/s (650 to 900) | ≥ 600 | met | 2026-01-02, 0123456789ab |" in text
    assert "| one | ratio | 0.9 | ≥ 0.97 | **missed** |" in text
    assert "| two | | | | failed: the server \\| ended |" in text
    assert "| three | | | | left out: needs a network of its own | |" in text
    assert "a processor, 2 cores, Linux x86_64, Python 3.11.0; numpy 1.26.4" in text
    assert "not measured: a peer: it is not installed" in text
    assert "![one](plots/one-1.png)" in text
    assert (tmp_path / "plots" / "one-1.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "report.json").read_text())
    assert [entry["scenario"] for entry in content["scenarios"]] == ["one", "two"]
    assert content["scenarios"][0]["host"]["commit"] == "0123456789ab"
    assert content["left_out"] == {"three": "needs a network of its own"}


def test_a_report_without_charts_draws_its_figures(tmp_path: Path) -> None:
    """A scenario with figures only gets them as bars, however few they are."""
    write_result(result(measured=Measured((Figure("ratio", "", (1.0, 2.0)),)), judgements=()), tmp_path)
    write_report(tmp_path, {})
    assert (tmp_path / "plots" / "one-1.png").is_file()


@pytest.mark.parametrize(
    ("value", "shown"), [(12345.6, "12,346"), (99.96, "100.0"), (42.04, "42.0"), (0.9701, "0.97"), (0.0, "0")]
)
def test_numbers_are_as_long_as_they_are_true(value: float, shown: str) -> None:
    """Three digits."""
    assert number(value) == shown
