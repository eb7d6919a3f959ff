"""The load generator: what it sends, what it counts, and how it says no."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundglass.errors import GroundglassError, MissingExtra, ServerError, ServerUnreachable, SettingError
from groundglass_bench.load import Load, Sample, run_load
from groundglass_bench.load.arrivals import Arrivals
from groundglass_bench.load.result import combine
from groundglass_bench.load.samples import Record, read_record, write_record
from groundglass_bench.load.settings import OPTIONS, arguments, format_slices, parse_load, parse_slices
from groundglass_bench.load.sources import CUT_OFF, fate
from groundglass_bench.load.studies import LESION_SLICES, Phantoms, SyntheticStudy, check_verdict
from groundglass_client.session import ScanAnalysis, SessionSettings, analyse
from groundglass_client.testing import InMemoryTransport


@pytest.fixture(scope="module")
def phantoms() -> Phantoms:
    """Studies of up to 70 slices."""
    return Phantoms(70)


def analysed(phantoms: Phantoms, made: SyntheticStudy) -> ScanAnalysis:
    """What a server in memory says of a synthetic study."""
    how = SessionSettings(masks=False)
    return analyse(made.study, InMemoryTransport(), lambda source: phantoms.hu(made, source), how)


@settings(max_examples=8, deadline=None)
@given(slices=st.integers(1, 70))
def test_the_verdict_of_a_synthetic_study_is_known_beforehand(phantoms: Phantoms, slices: int) -> None:
    """A study of any size shows its lesion where it says, and a right report passes the check."""
    made = phantoms.study(slices)
    report = analysed(phantoms, made).report
    assert report.longest_run == made.longest_run == min(LESION_SLICES, slices // 2)
    check_verdict(made, report, None)


def test_a_wrong_verdict_is_an_error(phantoms: Phantoms) -> None:
    """A run that is too short or lies elsewhere, or a scan verdict that doesn't follow from it, is refused."""
    made = phantoms.study(60)
    report = analysed(phantoms, made).report
    with pytest.raises(ServerError, match="longest run of 20, expected 19"):
        check_verdict(replace(made, lesion_end=made.lesion_end - 1), report, None)
    with pytest.raises(ServerError, match="slice 20 is positive"):
        check_verdict(replace(made, lesion_start=21, lesion_end=41), report, None)
    with pytest.raises(ServerError, match="wrong verdict: negative"):
        check_verdict(made, replace(report, scan_positive=False), None)


def test_another_network_may_have_a_run_of_its_own(phantoms: Phantoms) -> None:
    """With an expected run given, that run is right and the lesion's is wrong."""
    made = phantoms.study(60)
    report = analysed(phantoms, made).report
    check_verdict(made, replace(report, longest_run=60), 60)
    with pytest.raises(ServerError, match="longest run of 20, expected 60"):
        check_verdict(made, report, 60)


@given(calls=st.lists(st.floats(0.0, 20.0), max_size=20).map(sorted))
def test_arrivals_do_not_depend_on_who_asks_when(calls: list[float]) -> None:
    """However late the generator looks, it finds every arrival, at the time that it was due."""
    gaps = np.random.default_rng(3).exponential(0.5, size=200)
    expected = [at_s for at_s in 100.0 + np.cumsum(gaps) if at_s <= 120.0]
    arrivals = Arrivals(2.0, 100.0, np.random.default_rng(3))
    found = [at_s for call in [*calls, 20.0] for at_s in arrivals.due(100.0 + call)]
    assert found == pytest.approx(expected)


def sample(intended_s: float, seconds: float, **values: Any) -> Sample:
    """A study of ten slices that was sent at once."""
    return Sample(intended_s, intended_s, seconds, 10, **values)


def test_figures_are_exact_order_statistics_of_the_measured_window() -> None:
    """Percentiles are measured latencies; the warm-up and failures are left out of them; throughput is the window's."""
    load = Load(duration_s=10.0, warm_up_s=5.0, users=8)
    samples = [
        sample(101.0, 3.9, answers=((104.9, 10),)),  # all before the window
        sample(104.0, 2.0, answers=((104.5, 4), (105.5, 6))),  # ends in it
        *(sample(106.0 + index, 0.123456789 + index, answers=((106.5 + index, 10),)) for index in range(4)),
        sample(110.0, 1.0, error="wrong verdict", answers=((110.5, 10),)),
        Sample(111.0, 111.5, 0.5, 10, "refused by the generator: 4 studies in flight", sent=False),
        sample(114.0, 3.0, answers=((114.5, 5), (116.0, 5))),  # its end lies behind the window
        sample(115.5, 0.1, answers=((115.6, 10),)),  # begins behind the window
    ]
    result = combine(load, "a:1", [Record(100.0, 117.0, samples)])
    assert result.window == (105.0, 115.0)
    assert len(result.samples) == 7
    assert [result.latency_s(percent) for percent in (20, 50, 90, 99)] == [
        0.123456789,
        2.123456789,
        3.123456789,
        3.123456789,
    ]
    assert result.failures == {"wrong verdict": 1, "refused by the generator: 4 studies in flight": 1}
    assert result.studies_per_s == pytest.approx(5 / 10)
    assert result.slices_per_s == pytest.approx((6 + 40 + 5) / 10)
    assert result.offered_studies_per_s == pytest.approx(7 / 10)
    assert result.generator_delay_s == 0.5
    assert result.most_in_flight == 3  # 110.0 to 110.1
    assert result.summary()["failed"] == 2


def test_a_load_of_which_nothing_was_answered_has_no_latency() -> None:
    """Every latency is None in the summary, and the reasons are all there."""
    records = [Record(0.0, 20.0, [sample(1.0, 2.0, error="no")]), Record(1.0, 19.0, [sample(3.0, 2.0, error="no")])]
    found = combine(Load(duration_s=30.0), "a:1", records)
    assert found.window == (1.0, 19.0)
    assert found.summary()["latency_s"] == {"p50": None, "p90": None, "p99": None, "max": None}
    assert found.failures == {"no": 2}
    with pytest.raises(GroundglassError, match="nothing was measured"):
        combine(Load(warm_up_s=30.0), "a:1", records)


def test_samples_survive_their_file(tmp_path: Path) -> None:
    """What is written is read back, unrounded."""
    record = Record(1.1, 2.2, [sample(1.0 / 3, 2.0 / 7, answers=((1.5, 8), (1.6, 2))), sample(2.0, 1.0, error="é")])
    write_record(record, tmp_path / "samples.json")
    assert read_record(tmp_path / "samples.json") == record


@given(
    load=st.builds(
        Load,
        rate_per_s=st.none(),
        slices=st.integers(1, 65_536) | st.tuples(st.integers(1, 100), st.integers(100, 65_536)),
        wait_s=st.floats(0, 10),
        seed=st.integers(0, 2**32),
        masks=st.booleans(),
        shared_memory=st.booleans(),
        expected_run=st.none() | st.integers(0, 99),
        window=st.integers(1, 16),
    )
    | st.builds(Load, loop=st.just("open"), rate_per_s=st.floats(0.001, 100))
)
def test_a_load_survives_the_command_line(load: Load) -> None:
    """What the runner hands to locust is what locust's process makes of it."""
    words: dict[str, Any] = {option.field: option.default for option in OPTIONS}
    flags = {option.flag: option for option in OPTIONS}
    given = iter(arguments(load))
    for flag in given:
        option = flags["--" + flag.removeprefix("--").removeprefix("no-")]
        words[option.field] = not flag.startswith("--no-") if option.kind is bool else option.kind(next(given))
    assert parse_load(words, load.users, load.duration_s) == load


@given(st.integers(1, 10**6) | st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)))
def test_slices_are_read_as_they_are_written(slices: int | tuple[int, int]) -> None:
    """A number and a range go through text and back."""
    assert parse_slices(format_slices(slices)) == slices


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"users": 0}, "users 0: expected 1 or more"),
        ({"loop": "spiral"}, "expected closed or open"),
        ({"loop": "open"}, "an open loop needs its rate"),
        ({"loop": "open", "rate_per_s": 0.0}, "rate_per_s 0.0: expected more than 0"),
        ({"loop": "open", "rate_per_s": float("nan")}, "rate_per_s nan: expected more than 0"),
        ({"loop": "open", "rate_per_s": 1.0, "wait_s": 1.0}, "a wait is a closed loop's"),
        ({"rate_per_s": 1.0}, "a rate is an open loop's"),
        ({"slices": 0}, "slices 0: a study has 1 to 65536"),
        ({"slices": 65_537}, "slices 65537"),
        ({"slices": (9, 3)}, "slices 9..3"),
        ({"duration_s": 0.0}, "duration_s 0.0: expected more than 0"),
        ({"duration_s": float("inf")}, "duration_s inf"),
        ({"warm_up_s": -1.0}, "warm_up_s -1.0: expected 0 or more"),
        ({"max_in_flight": 0}, "max_in_flight 0"),
        ({"request_timeout_s": 0.0}, "request_timeout_s 0.0"),
        ({"processes": 2}, "2 processes for users 1"),
    ],
)
def test_a_load_that_cant_be_made_is_refused(values: dict[str, Any], words: str) -> None:
    """Zero users, no rate, an impossible study: an error that names the setting."""
    with pytest.raises(SettingError, match=words):
        Load(**values)


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("slices", "many", "slices 'many': expected a number, or a range"),
        ("slices", "1..", "slices '1..'"),
        ("rate_per_s", "fast", "rate 'fast': expected a number"),
        ("expected_run", "1.5", "expected run '1.5'"),
    ],
)
def test_an_option_that_is_no_number_is_refused(field: str, text: str, words: str) -> None:
    """The error names the option and what it got."""
    given: dict[str, Any] = {option.field: option.default for option in OPTIONS}
    with pytest.raises(SettingError, match=words):
        parse_load({**given, field: text}, 1, 1.0)


def test_a_study_that_is_killed_was_cut_off() -> None:
    """However its session leaves what it waited for; what fails without a kill is named."""
    fates: list[str] = []

    def session(seconds: float) -> None:
        try:
            try:
                gevent.sleep(seconds)
            finally:
                raise RuntimeError("released too many times")
        except RuntimeError as failure:
            fates.append(fate(failure))

    session(0.0)
    killed = gevent.spawn(session, 60.0)
    gevent.sleep(0.0)
    killed.kill()
    assert fates == ["RuntimeError: released too many times", CUT_OFF]
    assert fate(ServerError("a:1 said\nno")) == "a:1 said no"


def test_a_server_that_isnt_there_ends_it_before_it_starts() -> None:
    """Nobody listens: one error, before any process is started; an address that is none is a wrong setting."""
    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:9"):
        run_load(Load(), "127.0.0.1:9")
    with pytest.raises(SettingError, match="HOST:PORT"):
        run_load(Load(), "nowhere")


def test_without_locust_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to install it."""
    monkeypatch.setattr(importlib, "util", SimpleNamespace(find_spec=lambda name: None))
    with pytest.raises(MissingExtra, match=r"groundglass\[bench\]"):
        run_load(Load(), "127.0.0.1:9")
