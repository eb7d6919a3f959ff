"""A shadow finds every disagreement of a candidate, and never touches what the live version answers."""

import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from client_study import QUICK, SIDE, study_of
from groundglass import contract
from groundglass.errors import ServerRefused, ServerUnreachable, SettingError, VersionGone
from groundglass.finding import fold
from groundglass.study import SliceSource
from groundglass_client.chunk import Chunk
from groundglass_client.requests import Request, Tensors, fold_request, scan_request
from groundglass_client.session import ScanAnalysis, analyse
from groundglass_client.shadow import ShadowReport, ShadowSettings, ShadowTransport
from groundglass_client.testing import InMemoryTransport

AIR, FAINT, DENSE = -1000, 5, 40
"""Hounsfield units that no version marks, that version 1 alone marks, and that both mark."""

ALL = ShadowSettings(patient=True, close_s=5.0)
HASTY = ShadowSettings(close_s=0.05)

Answer = Callable[[Request], Future[Tensors]]


class TwoVersions(InMemoryTransport):
    """Version 1 is live, and version 2 marks from 20 HU in place of 0. Copies may be answered in another way."""

    def __init__(self, answer: Answer | None = None, mark_from_hu: int = 20) -> None:
        super().__init__(live="1", pinned={"1", "2"}, mark_from_hu={"2": mark_from_hu})
        self.answer, self.copies = answer, list[Request]()

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        if request.pin != "2":
            return super().send(request, timeout_s)
        self.copies.append(request)
        return self.answer(request) if self.answer else super().send(request, timeout_s)


class Slices:
    """Decodes to even slices of the given Hounsfield units."""

    def __init__(self, greys: Sequence[int]) -> None:
        self.greys = greys

    def __call__(self, source: SliceSource) -> NDArray[np.int16]:
        return np.full((SIDE, SIDE), self.greys[source.index], np.int16)


def unanswered(request: Request) -> Future[Tensors]:
    """An answer that never comes."""
    return Future()


def refused(words: str) -> Answer:
    """An answer that is an error."""

    def answer(request: Request) -> Future[Tensors]:
        future: Future[Tensors] = Future()
        key = request.tensors[contract.STUDY.name][0, 0].decode()
        future.set_exception(ServerRefused(words.format(key=key)))
        return future

    return answer


def shadowed(
    greys: Sequence[int], transport: InMemoryTransport, shadow: ShadowSettings = ALL, *, masks: bool = True
) -> tuple[ScanAnalysis, ShadowReport]:
    """A study through the live version, and what its shadow found."""
    with ShadowTransport(transport, "2", shadow) as wrapped:
        analysis = analyse(study_of(len(greys)), wrapped, Slices(greys), replace(QUICK, masks=masks))
    return analysis, wrapped.report()


def request_of(
    greys: Sequence[int], key: str = "live-key", first: int = 0, count: int = 0, pin: str | None = None
) -> Request:
    """A request of slices of these Hounsfield units, from index ``first`` of a scan of ``count``, or of them all."""
    indices = np.arange(first, first + len(greys), dtype=np.int32)
    hu = np.repeat(np.array(greys, np.int16), SIDE * SIDE).reshape(-1, SIDE, SIDE)
    model = contract.CT_SCAN if pin is None else contract.pinned(pin)
    return scan_request(Chunk(indices, hu), key, count or len(greys), masks=True, model=model)


def test_the_same_network_agrees() -> None:
    """A candidate that answers as the live version does agrees, in every figure."""
    _, report = shadowed([DENSE] * 20 + [AIR] * 10, TwoVersions(mark_from_hu=0))
    assert report.agrees
    assert (report.slices_compared, report.slices_disagreeing, report.slices_mask_differs) == (30, 0, 0)
    assert (report.scans_compared, report.scans_not_compared, report.skipped) == (1, 0, 0)
    assert (report.dice_worst, report.dice_mean) == (1.0, 1.0)
    assert (report.live_versions, report.candidate_version, report.worst) == (("1",), "2", ())
    assert report.live_latency is not None
    assert report.candidate_latency is not None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([AIR, FAINT, DENSE]), min_size=1, max_size=40), st.integers(1, 5))
def test_exactly_the_slices_that_differ_are_counted(greys: list[int], window: int) -> None:
    """Of any scan, in any window, every slice that the candidate sees otherwise counts, and no other."""
    analysis, report = shadowed(greys, TwoVersions(), replace(ALL, window=window, pictures=len(greys)))
    faint = [index for index, grey in enumerate(greys) if grey == FAINT]
    live, candidate = (
        fold([(index, grey >= least) for index, grey in enumerate(greys)], len(greys)) for least in (FAINT, DENSE)
    )
    assert report.slices_compared == report.slices_with_mask == len(greys)
    differing = (report.slices_mask_differs, report.slices_pixels_differ, report.slices_verdict_differs)
    assert differing == (len(faint),) * 3
    assert report.slices_disagreeing == len(faint)
    assert sorted(slice_.index for slice_ in report.worst) == faint
    assert report.scans_compared == 1
    assert report.scans_run_differs == (live.longest_run != candidate.longest_run)
    assert report.scans_verdict_differs == (live.positive != candidate.positive)
    marked = [grey == DENSE for grey in greys if grey != AIR]
    assert report.dice_mean == (pytest.approx(np.mean(marked)) if marked else None)
    assert report.agrees == (not faint)
    assert analysis.report.longest_run == live.longest_run


@pytest.mark.parametrize(
    "answer", [None, unanswered, refused("no"), lambda request: 1 / 0, lambda request: "no future"]
)
def test_the_live_answer_is_the_same_whatever_the_candidate_does(answer: Answer | None) -> None:
    """Verdicts, masks and version of the live answer are those of a study without a shadow."""
    greys = [AIR] * 3 + [FAINT] * 17
    alone = analyse(study_of(20), TwoVersions(), Slices(greys), QUICK)
    analysis, _ = shadowed(greys, TwoVersions(answer), HASTY)
    assert replace(analysis.report, seconds=0.0, created="") == replace(alone.report, seconds=0.0, created="")
    assert analysis.masks is not None
    assert alone.masks is not None
    assert np.array_equal(analysis.masks, alone.masks)


def test_the_live_answer_does_not_wait_for_a_copy() -> None:
    """A study is done while its first copy is still being put on the wire."""
    on_the_wire = threading.Event()

    def stuck(request: Request) -> Future[Tensors]:
        on_the_wire.wait(10.0)
        return unanswered(request)

    with ShadowTransport(TwoVersions(stuck), "2", HASTY) as shadow:
        report = analyse(study_of(20), shadow, Slices([DENSE] * 20), QUICK).report
        assert not on_the_wire.is_set()
        on_the_wire.set()
    assert report.scan_positive


def test_copies_are_bounded_and_what_gets_none_is_skipped() -> None:
    """A candidate that never answers holds as many copies as the window is wide; every other request is skipped."""
    transport = TwoVersions(unanswered)
    _, report = shadowed([AIR] * 40, transport, replace(HASTY, window=3))
    assert len(transport.copies) == 3
    assert (report.requests_compared, report.skipped, report.candidate_failures) == (0, 7, 3)
    assert not report.agrees
    assert report.failure_messages == ("no answer until 0.05 s after the end",)


def test_a_copy_never_waits_for_the_candidate_to_answer_another() -> None:
    """The window is free again as soon as the candidate answered, and the next request gets its copy."""
    waiting: list[Future[Tensors]] = []

    def answer_later(request: Request) -> Future[Tensors]:
        waiting.append(Future())
        return waiting[-1]

    transport = TwoVersions(answer_later)
    with ShadowTransport(transport, "2", ShadowSettings(window=1)) as shadow:
        shadow.send(request_of([AIR], count=3), 1.0)
        shadow.send(request_of([AIR], first=1, count=3), 1.0)
        assert shadow.report().skipped == 1
        until(lambda: len(waiting) == 1)
        waiting[0].set_result(InMemoryTransport.send(transport, transport.copies[0], 1.0).result())
        until(lambda: shadow.report().requests_compared == 1)
        transport.answer = None
        shadow.send(request_of([AIR], first=2, count=3), 1.0)
    assert (shadow.report().requests_compared, shadow.report().skipped) == (2, 1)


def test_a_patient_shadow_skips_nothing() -> None:
    """A replay compares every request, one at a time if need be."""
    _, report = shadowed([DENSE] * 40, TwoVersions(), replace(ALL, window=1))
    assert (report.slices_compared, report.skipped, report.scans_compared) == (40, 0, 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (refused("out of memory"), "out of memory"),
        (lambda request: 1 / 0, "division by zero"),
        (lambda request: "no future", "'str' object has no attribute 'add_done_callback'"),
    ],
    ids=["refusal", "exception", "nonsense"],
)
def test_failures_of_the_candidate_are_counted_with_their_first_messages(answer: Answer, message: str) -> None:
    """Every copy that fails counts; the same message is told once."""
    _, report = shadowed([AIR] * 12, TwoVersions(answer))
    assert (report.candidate_failures, report.slices_compared, report.agrees) == (3, 0, False)
    assert report.failure_messages == (message,)
    assert report.scans_not_compared == 1


def test_a_garbled_answer_is_a_failure_of_the_candidate() -> None:
    """A candidate that leaves a tensor out, or misshapes it, is counted as failed and named so."""

    def without_masks(request: Request) -> Future[Tensors]:
        future: Future[Tensors] = Future()
        future.set_result({"LESION_PIXELS": np.zeros((4, 1), np.int32), "SLICE_POSITIVE": np.zeros((4, 1), np.bool_)})
        return future

    _, report = shadowed([AIR] * 4, TwoVersions(without_masks))
    assert report.candidate_failures == 1
    assert "MASK" in report.failure_messages[0]


def test_no_study_key_is_told(tmp_path: Path) -> None:
    """Neither the live key nor the candidate's is in the report, its text or the names of pictures."""
    transport = TwoVersions(refused("study {key} is too large, and so is live-key"))
    with ShadowTransport(transport, "2", ALL) as shadow:
        shadow.send(request_of([FAINT]), 1.0)
        shadow.close()
        transport.answer = None
    with ShadowTransport(transport, "2", ALL) as again:
        again.send(request_of([FAINT], key="other-live-key"), 1.0)
    paths = again.write_pictures(tmp_path)
    keys = {copy.tensors[contract.STUDY.name][0, 0].decode() for copy in transport.copies} | {"live-key"}
    told = "".join(
        [json.dumps(shadow.report().to_json()), shadow.report().as_text(), again.report().as_text(), *map(str, paths)]
    )
    assert "is too large" in told
    assert len(keys) == 3
    assert not [key for key in keys if key in told]


def test_a_scan_has_one_key_of_its_own_under_the_candidate() -> None:
    """Chunks of one scan go under one new key, those of another under another, and probes stay probes."""
    transport = TwoVersions()
    with ShadowTransport(transport, "2", ALL) as shadow:
        for key, first in (("a", 0), ("b", 0), ("a", 1), ("", 0)):
            shadow.send(request_of([AIR], key=key, first=first, count=2), 1.0)
    first_a, only_b, second_a, probe = (copy.tensors[contract.STUDY.name][0, 0] for copy in transport.copies)
    assert first_a == second_a != only_b
    assert not {first_a, only_b} & {b"a", b"b"}
    assert probe == contract.PROBE_STUDY


def test_a_copy_is_apart_from_the_live_request() -> None:
    """The copy shares no memory with a request whose buffer is another's soon, and asks for every output."""
    transport = TwoVersions()
    request = request_of([FAINT, DENSE])
    buffer = transport.buffers().take(request.tensors["HU"].nbytes)
    sent = np.array(request.tensors["HU"])
    hu = buffer.hu(*sent.shape)
    hu[:] = sent
    with ShadowTransport(transport, "2", ALL) as shadow:
        shadow.send(replace(request, tensors={**request.tensors, "HU": hu}, buffer=buffer), 1.0).result()
        hu[:] = AIR
    (copy,) = transport.copies
    assert copy.buffer is None
    assert copy.outputs == contract.CT_SCAN.outputs
    assert np.array_equal(copy.tensors["HU"], sent)


def test_rows_of_several_scans_in_one_request_are_told_apart() -> None:
    """Scans that share a request are compared each by itself."""
    one, other = request_of([FAINT] * 16, key="one"), request_of([DENSE] * 16, key="other")
    tensors = {name: np.concatenate([one.tensors[name], other.tensors[name]]) for name in one.tensors}
    with ShadowTransport(TwoVersions(), "2", ALL) as shadow:
        shadow.send(replace(one, tensors=tensors), 1.0)
    report = shadow.report()
    assert (report.scans_compared, report.scans_verdict_differs, report.slices_disagreeing) == (2, 1, 16)


def test_scans_are_awaited_in_bounded_number() -> None:
    """The oldest unfinished scan makes room for a new one, and counts as not compared, as do those open at the end."""
    with ShadowTransport(TwoVersions(), "2", replace(ALL, scans=2)) as shadow:
        for number in range(5):
            shadow.send(request_of([AIR], key=f"scan {number}", count=2), 1.0)
        assert shadow.report().scans_not_compared == 3
        shadow.send(request_of([AIR], key="scan 4", first=1, count=2), 1.0)
    assert (shadow.report().scans_compared, shadow.report().scans_not_compared) == (1, 4)


def test_what_is_not_for_the_live_version_gets_no_copy() -> None:
    """Folds, and requests for the candidate itself, go through alone; those for another version by name get a copy."""
    transport = TwoVersions()
    with ShadowTransport(transport, "2", ALL) as shadow:
        shadow.send(fold_request(np.ones(3, np.bool_), "key"), 1.0).result()
        shadow.send(request_of([FAINT], pin="2"), 1.0).result()
        assert len(transport.copies) == 1
        shadow.send(request_of([FAINT], key="another", pin="1"), 1.0).result()
    report = shadow.report()
    assert (report.to_candidate, report.requests_compared, report.skipped) == (1, 1, 0)


def test_a_request_without_slice_verdicts_is_skipped() -> None:
    """What the caller did not ask for can't be compared, and that is counted."""
    with ShadowTransport(TwoVersions(), "2", ALL) as shadow:
        shadow.send(replace(request_of([FAINT]), outputs=(contract.LONGEST_RUN,)), 1.0).result()
    assert (shadow.report().skipped, shadow.report().agrees) == (1, False)


def test_a_candidate_that_is_not_served_is_named_at_once_and_later_only_counted() -> None:
    """A study can't begin under a shadow that is not there; a shadow that goes away fails no study."""
    transport = TwoVersions()
    with pytest.raises(VersionGone, match=r"ct_scan_v7\. Version 1 is live; .* by name: 1, 2"):
        ShadowTransport(transport, "7").describe(1.0)
    with ShadowTransport(transport, "2", ALL) as shadow:
        assert shadow.describe(1.0) == transport.describe(1.0)
        transport.retire("2")
        report = analyse(study_of(4), shadow, Slices([AIR] * 4), QUICK).report
    assert report.model_version == "1"
    assert shadow.report().candidate_failures == 1


def test_without_masks_areas_and_verdicts_are_compared() -> None:
    """A caller who wants no masks gets none, and still learns of slices with another lesion area."""
    analysis, report = shadowed([AIR, FAINT, DENSE], TwoVersions(), masks=False)
    assert analysis.masks is None
    assert (report.slices_compared, report.slices_with_mask, report.slices_mask_differs) == (3, 0, 0)
    assert (report.slices_disagreeing, report.slices_pixels_differ, report.dice_worst) == (1, 1, None)


@pytest.mark.parametrize(("tolerance", "disagreeing"), [(0, 1), (63, 1), (64, 0)])
def test_masks_may_differ_by_the_tolerance(tolerance: int, disagreeing: int) -> None:
    """Up to so many pixels of one mask are no disagreement, and are still counted as a difference."""
    hu = np.full((1, 64, 64), DENSE, np.int16)
    hu[0, 0, 0] = FAINT  # 64 pixels of the mask
    request = request_of([DENSE])
    with ShadowTransport(TwoVersions(), "2", replace(ALL, mask_tolerance=tolerance)) as shadow:
        shadow.send(replace(request, tensors={**request.tensors, "HU": hu}), 1.0).result()
    report = shadow.report()
    assert (report.slices_disagreeing, report.slices_mask_differs) == (disagreeing, 1)
    assert report.agrees == (not disagreeing)


def test_a_live_failure_is_nobodys_disagreement_and_ends_its_copy() -> None:
    """When the live version does not answer, its copy is cancelled, and nothing is held against the candidate."""
    live: Future[Tensors] = Future()

    class Failing(TwoVersions):
        def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
            return super().send(request, timeout_s) if request.pin == "2" else live

    copies: list[Future[Tensors]] = []
    transport = Failing(lambda request: copies.append(Future()) or copies[-1])
    with ShadowTransport(transport, "2", ALL) as shadow:
        future = shadow.send(request_of([FAINT]), 1.0)
        until(lambda: bool(copies))
        live.set_exception(ServerUnreachable("connection reset"))
        with pytest.raises(ServerUnreachable, match="connection reset"):
            future.result()
    assert copies[0].cancelled()
    assert (shadow.report().live_failures, shadow.report().candidate_failures) == (1, 0)


def test_cancelling_reaches_the_live_request() -> None:
    """A caller that cancels cancels the live request itself; the copy goes with it."""
    live: Future[Tensors] = Future()

    class Hanging(TwoVersions):
        def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
            return super().send(request, timeout_s) if request.pin == "2" else live

    with ShadowTransport(Hanging(unanswered), "2", ALL) as shadow:
        shadow.send(request_of([AIR]), 1.0).cancel()
        with pytest.raises(CancelledError):
            live.result(timeout=0)
    assert (shadow.report().live_failures, shadow.report().candidate_failures) == (1, 0)


def test_a_closed_shadow_only_hands_on() -> None:
    """After the end, requests go to the live version alone, and closing again does nothing."""
    transport = TwoVersions()
    shadow = ShadowTransport(transport, "2", ALL)
    shadow.close()
    shadow.close()
    assert shadow.send(request_of([FAINT]), 1.0).result()["LESION_PIXELS"].tolist() == [[512 * 512]]
    assert not transport.copies
    assert shadow.report().complaints == ("nothing was compared",)


def test_the_worst_slices_become_pictures(tmp_path: Path) -> None:
    """One picture a slice, the worst first, in both colours; a slice that came twice has one, older ones go."""
    (tmp_path / "disagreement_09_slice_0001.png").write_bytes(b"of an earlier run")
    (tmp_path / "disagreement_notes.png").write_bytes(b"of somebody else")
    hu = np.full((4, 64, 64), AIR, np.int16)
    for index, columns in enumerate((2, 32, 8, 16)):
        hu[index, 8:40, 8 : 8 + columns] = FAINT
        hu[index, 8:16, 8:60] = DENSE
    with ShadowTransport(TwoVersions(), "2", replace(ALL, pictures=3)) as shadow:
        for key in ("first", "again"):
            request = request_of([AIR] * 4, key=key)
            shadow.send(replace(request, tensors={**request.tensors, "HU": hu}), 1.0).result()
    paths = shadow.write_pictures(tmp_path)
    assert [path.name for path in paths] == [
        f"disagreement_0{rank}_slice_000{index}.png" for rank, index in enumerate((1, 3, 2), 1)
    ]
    assert {path.name for path in tmp_path.iterdir()} == {*(path.name for path in paths), "disagreement_notes.png"}
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert pixels.shape == (700, 1200, 3)
        for colour in ((41, 128, 185), (230, 126, 34)):
            assert (np.abs(pixels - colour).sum(axis=2) < 12).sum() > 100
    assert [found.index for found in shadow.report().worst] == [1, 3, 2]


def test_another_verdict_is_worse_than_another_mask() -> None:
    """The pictures show the slices whose verdict changed before those whose mask changed more."""
    hu = np.full((2, 64, 64), AIR, np.int16)
    hu[0], hu[0, 0, :4] = FAINT, DENSE
    hu[1, 0, 0] = FAINT
    request = request_of([AIR] * 2)
    with ShadowTransport(TwoVersions(), "2", ALL) as shadow:
        shadow.send(replace(request, tensors={**request.tensors, "HU": hu}), 1.0).result()
    assert [(found.index, found.verdict_differs) for found in shadow.report().worst] == [(1, True), (0, False)]


def test_a_folder_that_can_not_be_written_is_one_clear_error(tmp_path: Path) -> None:
    """Pictures that can't be written raise an error that names the folder."""
    (tmp_path / "file").write_text("in the way")
    with ShadowTransport(TwoVersions(), "2", ALL) as wrapped:
        wrapped.send(request_of([FAINT]), 1.0)
    with pytest.raises(SettingError, match=re.escape(str(tmp_path / "file"))):
        wrapped.write_pictures(tmp_path / "file")


def test_the_report_is_json_and_text() -> None:
    """Both forms say whether the versions agree and why not."""
    _, report = shadowed([FAINT] * 16 + [DENSE] * 4, TwoVersions())
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (found["agrees"], found["slices_disagreeing"], len(found["worst"])) == (False, 16, 8)
    text = report.as_text()
    assert text.splitlines()[0] == "candidate version 2 beside live version 1"
    assert text.splitlines()[-1] == (
        "does not agree: 16 of 20 slices disagree; 16 slices have another verdict; 1 of 1 scans another verdict; "
        "1 of 1 scans another longest run"
    )


def test_settings_that_make_no_sense_are_refused() -> None:
    """A window of nothing, a negative tolerance or a time that is no number is one clear error."""
    for wrong in ({"window": 0}, {"mask_tolerance": -1}, {"timeout_s": float("nan")}):
        with pytest.raises(SettingError, match=f"shadow setting {next(iter(wrong))}"):
            ShadowSettings(**wrong)


def test_threads_share_a_shadow() -> None:
    """Studies that are analysed at once through one shadow are each compared, every slice once."""
    with ShadowTransport(TwoVersions(), "2", replace(ALL, pictures=0)) as shadow:
        threads = [
            threading.Thread(target=lambda: analyse(study_of(24), shadow, Slices([FAINT, AIR] * 12), QUICK))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    report = shadow.report()
    assert (report.slices_compared, report.slices_disagreeing, report.scans_compared) == (96, 48, 4)


def until(condition: Callable[[], bool], patience_s: float = 5.0) -> None:
    """Wait for what another thread does."""
    tick = threading.Event()
    for _ in range(int(patience_s / 0.005)):
        if condition():
            return
        tick.wait(0.005)
    raise AssertionError("it did not happen")
