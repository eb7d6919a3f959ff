"""A canary answers its share of the studies, whole ones, and never fails one."""

from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client_study import QUICK, Decoder, study_of
from command import assert_one_clear_line, groundglass
from groundglass import contract
from groundglass.errors import DeadlinePassed, ServerError, ServerRefused, ServerUnreachable, SettingError
from groundglass.study import Study
from groundglass_client.canary import Canary
from groundglass_client.requests import Request, Tensors
from groundglass_client.session import analyse
from groundglass_client.testing import InMemoryTransport

SLICES = 12
STUDIES = 200
SHARE = 0.2
FEWEST, MOST = 22, 59
"""Of 200 studies at 0.2: 99.9 % of all draws lie between (binomial; 0.05 % on either side)."""

POSITIVES = [True] * SLICES


def study(number: int) -> Study:
    """A study of a series of its own."""
    plain = study_of(SLICES)
    return replace(plain, series=replace(plain.series, series_instance_uid=f"1.2.826.0.1.3680043.{number}"))


def two_versions(pinned: tuple[str, ...] = ("1", "2")) -> InMemoryTransport:
    """A server whose version 1 marks what version 2 leaves alone."""
    return InMemoryTransport(pinned=pinned, mark_from_hu={"2": 100})


ALL = replace(QUICK, canary=Canary("2", 1.0))


def test_the_candidate_answers_its_share_of_whole_studies() -> None:
    """Of many studies the candidate gets its share, within chance; every study is of one version, whole and right."""
    asked: list[Request] = []

    class Watched(InMemoryTransport):
        def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
            asked.append(request)
            return super().send(request, timeout_s)

    server = Watched(pinned=("1", "2"), mark_from_hu={"2": 100})
    settings = replace(QUICK, canary=Canary("2", SHARE))
    versions: Counter[str] = Counter()
    for number in range(STUDIES):
        asked.clear()
        report = analyse(study(number), server, Decoder(POSITIVES), settings).report
        versions[report.model_version] += 1
        assert {request.pin for request in asked if request.model is not contract.SCAN_AGGREGATOR} == {
            report.model_version
        }
        assert [result.positive for result in report.slices] == [report.model_version == "1"] * SLICES
    assert FEWEST <= versions["2"] <= MOST
    assert versions["1"] + versions["2"] == STUDIES


def test_a_study_sent_twice_goes_to_the_same_version() -> None:
    """The draw is the series' own: the same from another folder, with other slices, and at another time."""
    canary = Canary("2", 0.5)
    first = [canary.takes(study(number)) for number in range(100)]
    again = [canary.takes(replace(study(number), root=Path("elsewhere"), slices=())) for number in range(100)]
    assert first == again
    assert 0 < sum(first) < 100


def test_a_larger_share_takes_what_a_smaller_one_took() -> None:
    """Raising the share moves no study back, none is taken at 0 and all are at 1."""
    studies = [study(number) for number in range(100)]
    taken = [{n for n, one in enumerate(studies) if Canary("2", share).takes(one)} for share in (0.0, 0.1, 0.6, 1.0)]
    assert not taken[0]
    assert taken[1] < taken[2]
    assert len(taken[3]) == 100


def test_pictures_are_drawn_by_where_they_lie() -> None:
    """Studies without a series of their own are told apart by folder and number of slices."""
    canary = Canary("2", 0.5)
    drawn = {canary.takes(replace(study_of(4), root=Path(f"folder {number}"))) for number in range(50)}
    assert drawn == {True, False}
    assert len({canary.takes(study_of(4)) for _ in range(5)}) == 1


@pytest.mark.parametrize(
    "text", ["2", "2:", ":0.2", "x:0.2", "2:x", "2:1.1", "2:-0.1", "0:0.1", "2:nan", "2:0.1:3", ""]
)
def test_what_is_no_canary_is_refused(text: str) -> None:
    """Anything but a version and a share from 0 to 1 is told as such."""
    with pytest.raises(SettingError, match="canary"):
        Canary.parse(text)


def test_a_canary_is_read_from_what_a_user_types() -> None:
    """VERSION:SHARE gives both."""
    assert [Canary.parse(text) for text in ("2:0.2", "13:1", "3:.5")] == [
        Canary("2", 0.2), Canary("13", 1.0), Canary("3", 0.5)
    ]  # fmt: skip


def test_a_candidate_that_is_not_served_costs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Without the candidate every study goes to the live version, and the log says why."""
    report = analyse(study(1), two_versions(("1",)), Decoder(POSITIVES), ALL).report
    assert (report.model_version, report.longest_run) == ("1", SLICES)
    assert "canary version 2 can't be asked for by name (version 1 can): the study goes to version 1" in caplog.text


def test_a_candidate_retired_in_the_middle_costs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A study whose candidate goes is computed again, all of it, on the live version."""
    server = two_versions()
    heard: list[int] = []

    def on_slices(count: int) -> None:
        heard.append(count)
        server.retire("2")

    report = analyse(study(1), server, Decoder(POSITIVES), replace(ALL, window=1, ahead=1), on_slices).report
    assert (report.model_version, report.longest_run, sum(heard)) == ("1", SLICES, SLICES)
    assert "version 2, a canary, did not answer the whole study, which is computed again on version 1" in caplog.text


class Broken(InMemoryTransport):
    """The candidate answers one chunk and fails the others."""

    def __init__(self, failure: ServerError) -> None:
        super().__init__(pinned=("1", "2"), mark_from_hu={"2": 100})
        self.failure, self.candidates = failure, 0

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        self.candidates += request.pin == "2"
        if request.pin == "2" and self.candidates > 1:
            future: Future[Tensors] = Future()
            future.set_exception(self.failure)
            return future
        return super().send(request, timeout_s)


@pytest.mark.parametrize("failure", [ServerRefused("bad shape"), ServerUnreachable("stub process is not healthy")])
def test_a_candidate_that_fails_does_not_fail_the_study(failure: ServerError, caplog: pytest.LogCaptureFixture) -> None:
    """What the candidate refuses in the middle, or never answers, the live version answers from the start."""
    report = analyse(study(1), Broken(failure), Decoder(POSITIVES), replace(ALL, recovery_s=0.2)).report
    assert (report.model_version, report.longest_run) == ("1", SLICES)
    assert str(failure) in caplog.text


def test_a_candidate_that_answers_rubbish_does_not_fail_the_study() -> None:
    """Tensors of another shape from the candidate are refused, and the live version answers."""

    class Misshapen(InMemoryTransport):
        def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
            future = super().send(request, timeout_s)
            if request.pin != "2":
                return future
            wrong: Future[Tensors] = Future()
            wrong.set_result({**future.result(), contract.LESION_PIXELS.name: np.zeros((1, 7), np.int32)})
            return wrong

    assert analyse(study(1), Misshapen(pinned=("1", "2")), Decoder(POSITIVES), ALL).report.model_version == "1"


def test_the_deadline_holds_for_a_canary_too() -> None:
    """A candidate that can't be reached may use up the study's deadline, and no more."""
    server = Broken(ServerUnreachable("connection reset"))
    with pytest.raises(DeadlinePassed, match=r"0\.3 s"):
        analyse(study(1), server, Decoder(POSITIVES), replace(ALL, deadline_s=0.3))


def test_a_version_and_a_canary_exclude_each_other(tmp_path: Path) -> None:
    """Asking for a version and for a canary at once is one clear line, before any server is started."""
    done = groundglass("analyze", tmp_path, "--model-version", "1", "--canary", "2:0.1")
    assert_one_clear_line(done, "version 1 and a canary of version 2")


def test_a_canary_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    """What can't be read as a canary is told with the form that can."""
    assert_one_clear_line(groundglass("analyze", tmp_path, "--canary", "2"), "expected VERSION:SHARE")
