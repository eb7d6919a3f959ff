"""The parity gate: what is equivalent passes, what is not fails with the worst slice named, whatever the damage."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from PIL import Image

import logit_network
import probe_network
from groundglass.errors import ModelError, ParityError, SettingError
from groundglass.finding import fold
from groundglass.manifest import Manifest
from groundglass_export.answers import Answers
from groundglass_export.calibration import Calibration
from groundglass_export.engine import OnnxEngine, OnnxPreprocess
from groundglass_export.gate import LIMITS, Comparison, GateReport, GateScan, require, same_decision, verify
from groundglass_export.gate.coherence import Bracket, Coherence
from groundglass_export.gate.figures import SliceParity, dice, figures_of, upper_share
from groundglass_export.gate.judge import judge
from groundglass_export.gate.picture import write_picture
from groundglass_export.gate.report import ScanParity

CALIBRATION = Calibration(logit_network.PROBABILITY_THRESHOLD, logit_network.MIN_LESION_PIXELS)
VERDICTS = ("reference_positive", "candidate_positive")
POSITIVES = [False, True, True, False, True]

Masks = NDArray[np.bool_]


def _scan(name: str, positives: list[bool], seed: int = 0) -> GateScan:
    hu = logit_network.noisy_slices(positives, seed)
    return GateScan(name, len(hu), lambda index: hu[index])


def _comparison(candidate: onnx.ModelProto, *scans: GateScan) -> Comparison:
    return Comparison(
        OnnxEngine(logit_network.unet(), name="reference"),
        OnnxEngine(candidate, name="candidate"),
        OnnxPreprocess(probe_network.preprocess()),
        scans or (_scan("chest", POSITIVES),),
    )


def _complaints(report: GateReport) -> str:
    return "; ".join(complaint.text for complaint in report.complaints)


def test_an_equivalent_candidate_passes(tmp_path: Path) -> None:
    """The same network stored otherwise: weights in FP16 behind a cast, and a constant that says the same."""
    candidate = logit_network.unet()
    logit_network.set_constant(candidate, "weight", np.full((1, 1, 3, 3), np.float16(40 / 9), np.float32))
    reference = onnx.ModelProto()
    reference.CopyFrom(candidate)
    logit_network.half_stored(candidate, "weight")
    comparison = replace(_comparison(candidate), reference=OnnxEngine(reference))
    report = verify(comparison, calibration=CALIBRATION)
    assert report.passed, _complaints(report)
    assert report.overall.positive_slices == 3
    assert report.overall.mean_dice == 1.0
    assert report.as_text().endswith("\nequivalent")
    require(report)


def test_the_same_file_passes_and_the_report_says_so() -> None:
    """That a file equals itself is noted as what it is."""
    report = verify(_comparison(logit_network.unet()))
    assert report.passed
    assert any("the same file" in note for note in report.notes)


def _zeroed_weights(model: onnx.ModelProto) -> None:
    logit_network.set_constant(model, "weight", np.zeros((1, 1, 3, 3), np.float32))


def _threshold(model: onnx.ModelProto) -> None:
    probability = logit_network.PROBABILITY_THRESHOLD + 0.01
    logit_network.set_constant(model, "threshold", np.float32(math.log(probability / (1 - probability))))


def _not_a_number(model: onnx.ModelProto) -> None:
    """One pixel in a corner, where no lesion is."""
    spot = np.zeros((1, 1, 512, 512), np.float32)
    spot[0, 0, 0, 0] = np.nan
    model.graph.initializer.append(numpy_helper.from_array(spot, "spot"))
    logit_network.with_node_after(
        model, "LOGITS", lambda before, after: [helper.make_node("Add", [before, "spot"], [after])]
    )


def _inverted_verdict(model: onnx.ModelProto) -> None:
    logit_network.with_node_after(
        model, "SLICE_POSITIVE", lambda before, after: [helper.make_node("Not", [before], [after])]
    )


def _neighbours_leak(model: onnx.ModelProto) -> None:
    """Every slice of a batch is shifted by how far the batch's mean is from that of its own: nothing happens alone."""
    nodes = [
        helper.make_node("ReduceMean", ["IMAGE"], ["batch_mean"], keepdims=1),
        helper.make_node("ReduceMean", ["IMAGE", "inner"], ["own_mean"], keepdims=1),
        helper.make_node("Sub", ["batch_mean", "own_mean"], ["leak"]),
        helper.make_node("Mul", ["leak", "gain"], ["strong_leak"]),
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3], np.int64), "inner"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(200, np.float32), "gain"))
    logit_network.with_node_after(
        model, "LOGITS", lambda before, after: [*nodes, helper.make_node("Add", [before, "strong_leak"], [after])]
    )


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (logit_network.noisy_weights, "mean dice of positive slices"),
        (_zeroed_weights, "mean dice of positive slices 0,"),
        (_threshold, "candidate: probability threshold of MASK"),
        (logit_network.more_pixels, "candidate: lesion pixels that turn SLICE_POSITIVE"),
        (logit_network.reversed_bits, "candidate: probability threshold of MASK"),
        (logit_network.miscounted, "candidate: slices whose LESION_PIXELS are not those of MASK 5, allowed none"),
        (_not_a_number, "candidate: slices with logits that are not finite 5, allowed none, worst in chest slice 0"),
        (_inverted_verdict, "share of slices with the same verdict 0, allowed at least 1"),
    ],
)
@pytest.mark.parametrize("calibration", [CALIBRATION, None])
def test_a_damaged_candidate_fails(
    damage: Callable[[onnx.ModelProto], None], complaint: str, calibration: Calibration | None
) -> None:
    """Weights, thresholds, bit order, counts, verdicts, numbers that are none: each is complained of by its name."""
    candidate = logit_network.unet()
    damage(candidate)
    report = verify(_comparison(candidate), calibration=calibration)
    assert complaint in _complaints(report)
    with pytest.raises(ParityError, match=r"Worst slice: chest slice \d$"):
        require(report)


def test_a_candidate_that_mixes_the_slices_of_a_batch_fails() -> None:
    """Its answers to single slices are those of the reference; in a batch they are not."""
    candidate = logit_network.unet()
    _neighbours_leak(candidate)
    scan = _scan("chest", [True, False, True])
    report = verify(_comparison(candidate, scan), batch=1)
    assert [complaint.figure for complaint in report.complaints] == [
        "candidate: slices answered otherwise in a batch of 8 than alone"
    ]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_candidate_that_takes_single_slices_only_fails(batch: int) -> None:
    """It is tried on a batch even when the comparison itself goes slice by slice."""
    with pytest.raises(ParityError, match=r"fp32 candidate, .* no answer, so nothing is proved: [^\n]*$"):
        verify(_comparison(logit_network.single_slice_unet()), batch=batch)


def test_thresholds_are_held_to_the_manifests_when_they_are_known() -> None:
    """Candidate and reference that agree on another threshold than the stated one fail, both."""
    report = verify(_comparison(logit_network.unet()), calibration=Calibration(0.61, logit_network.MIN_LESION_PIXELS))
    found = _complaints(report)
    assert "reference: probability threshold of MASK" in found
    assert "candidate: probability threshold of MASK" in found


def test_a_scan_with_another_verdict_is_the_first_complaint() -> None:
    """15 positive slices in a row are one fewer under the candidate, which INT8 limits for slices would allow."""
    positives = [False, *[True] * 15, *[False] * 134]
    slices = [
        SliceParity("long", index, 100 * positive, 100 * positive, positive, positive and index != 7, 1.0, 0)
        for index, positive in enumerate(positives)
    ]
    verdicts = ([(item.index, getattr(item, who)) for item in slices] for who in VERDICTS)
    scan = ScanParity("long", figures_of(slices), *(fold(rows, len(slices)) for rows in verdicts))
    complaints = list(judge(slices, [scan], LIMITS["int8"]))
    assert [(complaint.figure, complaint.worst) for complaint in complaints] == [
        ("scans with another verdict", ("long", 7))
    ]


PASSING = SliceParity("chest", 0, 1000, 1000, True, True, 1.0, 0, 0.0, 0.0, 0.0, 500)


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize(
    ("broken", "figure"),
    [
        ({"dice": 0.0}, "mean dice of positive slices"),
        ({"dice": 0.5}, "dice of a positive slice"),
        ({"candidate_positive": False}, "share of slices with the same verdict"),
        ({"band_mean": 0.9, "band_pixels": 9000}, "mean difference of probability in lesions"),
        ({"probability_max": 1.1}, "largest difference of probability"),
        ({"candidate_pixels": 4500}, "change of all lesion pixels"),
    ],
)
def test_every_limit_is_enforced_at_every_precision(precision: str, broken: dict[str, float], figure: str) -> None:
    """One slice of forty that breaks one figure is complained of, and named."""
    slices = [replace(PASSING, index=index) for index in range(40)]
    slices[31] = replace(slices[31], **broken)
    complaints = list(judge(slices, [], LIMITS[precision]))
    assert (figure, ("chest", 31)) in [(complaint.figure, complaint.worst) for complaint in complaints]
    assert not list(judge([PASSING] * 50, [], LIMITS[precision]))


def test_a_single_bad_slice_is_not_hidden_by_a_good_mean() -> None:
    """A mean dice within the limit does not excuse one slice that is wholly wrong."""
    slices = [replace(PASSING, index=index) for index in range(200)]
    slices[31] = replace(slices[31], dice=0.5)
    assert figures_of(slices).mean_dice >= LIMITS["fp16"].mean_dice
    (complaint,) = judge(slices, [], LIMITS["fp16"])
    assert complaint.text == "dice of a positive slice 0.5, allowed at least 0.98, worst in chest slice 31"


def test_limits_do_not_grow_with_precision() -> None:
    """INT8 may never be asked for more than FP16, nor FP16 for more than FP32."""
    strictest = [LIMITS[precision] for precision in ("fp32", "fp16", "int8")]
    for strict, loose in itertools.pairwise(strictest):
        for at_least in ("mean_dice", "min_dice", "verdict_agreement"):
            assert getattr(strict, at_least) >= getattr(loose, at_least)
        for at_most in ("band_difference", "probability_difference", "lesion_difference"):
            assert getattr(strict, at_most) <= getattr(loose, at_most)


@pytest.mark.parametrize(
    ("scans", "complaint"),
    [
        ((), "no scan at all"),
        ((GateScan("empty", 0, lambda index: np.zeros((4, 4), np.int16)),), "a scan without slices"),
        ((_scan("twice", [True]), _scan("twice", [True])), "scans of the same name"),
    ],
)
def test_nothing_is_proved_by_nothing(scans: tuple[GateScan, ...], complaint: str) -> None:
    """No scans, no slices, or scans that can't be told apart are refused."""
    comparison = replace(_comparison(logit_network.unet()), scans=scans)
    with pytest.raises(ParityError, match=complaint):
        verify(comparison)


def test_slices_without_a_lesion_prove_nothing() -> None:
    """Masks that are empty everywhere agree, and the candidate fails all the same, unless the limits allow it."""
    comparison = _comparison(logit_network.unet(), _scan("healthy", [False] * 3))
    report = verify(comparison)
    assert _complaints(report) == "slices that the reference calls positive 0, allowed at least 1"
    assert verify(comparison, replace(LIMITS["fp32"], positive_slices=0)).passed


def test_the_reference_must_be_fp32() -> None:
    """Half against half would prove that both lose the same."""
    comparison = _comparison(logit_network.unet())
    with pytest.raises(ParityError, match="of precision fp16; the gate compares with FP32"):
        verify(replace(comparison, reference=_Sieve("fp16")))


def test_a_batch_of_none_is_refused() -> None:
    """The smallest batch is one slice."""
    with pytest.raises(SettingError, match="a batch of 0 slices"):
        verify(_comparison(logit_network.unet()), batch=0)


@given(npst.arrays(np.bool_, (2, 5, 7)))
def test_dice_is_what_its_definition_says(masks: Masks) -> None:
    """Common pixels twice over the pixels of both, counted as sets; 1 for two empty masks; the same both ways."""
    sets = [{tuple(place) for place in np.argwhere(mask).tolist()} for mask in masks]
    both = len(sets[0]) + len(sets[1])
    assert dice(*masks) == (2 * len(sets[0] & sets[1]) / both if both else 1.0)
    assert dice(*masks) == dice(*masks[::-1])
    assert (dice(*masks) == 1.0) == bool((masks[0] == masks[1]).all())


@pytest.mark.parametrize(("events", "trials"), [(0, 1), (0, 300), (1, 100), (7, 148), (147, 148)])
def test_the_share_that_cannot_be_excluded_is_exact(events: int, trials: int) -> None:
    """At the upper end, so few events or fewer have a probability of 5 %."""
    share = upper_share(events, trials)
    at_most = sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(events + 1))
    assert at_most == pytest.approx(0.05, rel=1e-6)


def test_every_slice_wrong_excludes_nothing() -> None:
    """The upper end is 1 when each slice differs."""
    assert upper_share(4, 4) == 1.0


@dataclass(frozen=True)
class _Sieve:
    """An engine of four lines: a pixel's probability is its grey value, and what is below ``blind`` is not seen."""

    precision: str = "fp32"
    blind: float = 0.0
    name: str = "sieve"

    @property
    def digest(self) -> str:
        return f"{self.precision} {self.blind}"

    def answers(self, images: NDArray[np.float32]) -> Answers:
        probability = np.where(images[:, 0] < self.blind, np.float32(0), images[:, 0])
        mask = probability >= 0.5
        pixels = mask.sum(axis=(1, 2), dtype=np.int32)
        return Answers(mask, pixels, pixels >= 6, probability)


class _Scaled:
    def image(self, hu: NDArray[np.int16]) -> NDArray[np.float32]:
        return (hu[None] / np.float32(255)).astype(np.float32)


HU = npst.arrays(np.int16, st.tuples(st.integers(1, 9), st.just(4), st.just(4)), elements=st.integers(0, 255))


@settings(max_examples=40)
@given(st.lists(HU, min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 20), st.floats(0, 1))
def test_the_batch_size_changes_nothing(scans: list[NDArray[np.int16]], one: int, other: int, blind: float) -> None:
    """Any batch size gives the same report to the last digit: figures, complaints, digest."""
    comparison = Comparison(
        _Sieve(),
        _Sieve("int8", blind),
        _Scaled(),
        [GateScan(f"scan {number}", len(hu), hu.__getitem__) for number, hu in enumerate(scans)],
    )
    assert verify(comparison, batch=one) == verify(comparison, batch=other)


@given(HU, st.floats(0, 1))
def test_figures_are_those_of_all_slices_at_once(hu: NDArray[np.int16], blind: float) -> None:
    """Figures gathered slice by slice are what numpy finds over the whole stack."""
    comparison = Comparison(_Sieve(), _Sieve("int8", blind), _Scaled(), [GateScan("one", len(hu), hu.__getitem__)])
    found = verify(comparison, batch=3).overall
    images = np.stack([_Scaled().image(one) for one in hu])
    a, b = _Sieve().answers(images), _Sieve("int8", blind).answers(images)
    difference = np.abs(a.probability.astype(np.float64) - b.probability)
    band = (a.probability >= 0.01) | (b.probability >= 0.01)
    assert found.probability_max == difference.max()
    assert found.probability_mean == pytest.approx(difference.mean())
    assert found.band_mean == pytest.approx(difference[band].mean() if band.any() else 0.0)
    assert found.pixel_difference_max == np.abs(a.pixels - b.pixels).max()
    assert found.verdicts_differing == (a.positive != b.positive).sum()
    assert found.positive_slices == a.positive.sum()
    if a.positive.any():
        assert found.mean_dice == pytest.approx(
            np.mean([dice(*pair) for pair in zip(a.mask[a.positive], b.mask[a.positive], strict=True)])
        )


def test_slices_pass_one_batch_at_a_time() -> None:
    """A batch is compared before the next is decoded, so that memory does not grow with the scan."""
    log: list[str] = []

    def decode(index: int) -> NDArray[np.int16]:
        log.append(f"slice {index}")
        return np.full((4, 4), 200, np.int16)

    comparison = Comparison(_Sieve(), _Sieve("int8"), _Scaled(), [GateScan("one", 5, decode)])
    verify(comparison, batch=2, progress=lambda done, total: log.append(f"{done} of {total}"))
    assert log[:8] == ["slice 0", "slice 1", "2 of 5", "slice 2", "slice 3", "4 of 5", "slice 4", "5 of 5"]


def test_the_digest_is_that_of_the_slices() -> None:
    """Same Hounsfield units, same digest, whatever the names; another value, order or division makes another."""

    def digest(*stacks: NDArray[np.int16]) -> str:
        scans = [GateScan(f"{id(stacks)} {number}", len(hu), hu.__getitem__) for number, hu in enumerate(stacks)]
        return verify(Comparison(_Sieve(), _Sieve("int8"), _Scaled(), scans)).slices_sha256

    hu = np.arange(64, dtype=np.int16).reshape(4, 4, 4)
    changed = hu.copy()
    changed[3, 3, 3] += 1
    assert digest(hu) == digest(hu.copy()) == digest(hu.astype(">i2"))
    assert (
        len({digest(hu), digest(changed), digest(hu[::-1]), digest(hu[:2], hu[2:]), digest(hu.reshape(4, 2, 8))}) == 5
    )


def test_the_report_says_what_was_not_proved() -> None:
    """Too few slices, no negative one, no positive scan, no probabilities: each is a note."""
    scan = _scan("short", [True])
    comparison = replace(
        _comparison(probe_network.unet(), scan), reference=OnnxEngine(probe_network.unet(), name="reference")
    )
    notes = "; ".join(verify(comparison).notes)
    for what in (
        "1 positive slices are few",
        "no slice is negative",
        "no scan is positive",
        "does not show its probabilities",
    ):
        assert what in notes


def test_the_report_as_json_and_for_the_manifest() -> None:
    """Both are plain JSON; the manifest's form names no scan, for it may be called after a person."""
    candidate = logit_network.unet()
    _not_a_number(candidate)
    report = verify(_comparison(candidate, _scan("Name of a person", POSITIVES)))
    whole = json.loads(json.dumps(report.to_json(), allow_nan=False))
    brief = json.dumps(report.as_dict(), allow_nan=False)
    assert whole["passed"] is False
    assert whole["complaints"][0]["text"] == report.complaints[0].text
    assert [item["index"] for item in whole["slices"]] == [0, 1, 2, 3, 4]
    assert whole["scans"][0]["reference"] == {"longest_run": 2, "positive": False}
    assert "person" not in brief
    assert json.loads(brief)["slices_sha256"] == report.slices_sha256


def test_the_table_names_scans_and_both_verdicts() -> None:
    """Each scan has its row, and what changed stands as before -> after."""
    candidate = logit_network.unet()
    _inverted_verdict(candidate)
    report = verify(_comparison(candidate, _scan("first", [True] * 16), _scan("second", [False, True])))
    rows = {line.split()[0]: line for line in report.as_text().splitlines() if line}
    assert rows["first"].endswith("16 -> 0  positive -> negative")
    assert rows["second"].endswith("negative")
    assert report.as_text().splitlines()[-1].startswith("NOT equivalent; worst slice: first ")


def test_the_picture_shows_the_worst_slice(tmp_path: Path) -> None:
    """It is a PNG, the error names it, and nothing else is left beside it."""
    candidate = logit_network.unet()
    logit_network.noisy_weights(candidate)
    comparison = _comparison(candidate)
    report = verify(comparison)
    picture = write_picture(report, comparison, tmp_path / "new" / "worst.png")
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert image.format == "PNG"
    assert any(red > blue + 60 for red, _, blue in colours), "the candidate's mask is orange"
    assert any(blue > red + 60 for red, _, blue in colours), "the reference's mask is blue"
    assert list(picture.parent.iterdir()) == [picture]
    with pytest.raises(ParityError, match=rf"Worst slice: chest slice {report.worst[1]}, see .*worst\.png$"):
        require(report, picture)


def test_a_picture_of_nothing_is_drawn_too(tmp_path: Path) -> None:
    """Empty masks, as under a candidate without numbers, leave the whole slice to be seen."""
    comparison = _comparison(logit_network.unet(), _scan("healthy", [False] * 2))
    report = verify(comparison)
    assert write_picture(report, comparison, tmp_path / "empty.png").stat().st_size > 10_000


def test_a_picture_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    """A file where a folder should be."""
    (tmp_path / "file").write_text("")
    comparison = _comparison(logit_network.unet())
    with pytest.raises(ModelError, match=r"worst\.png was not written"):
        write_picture(verify(comparison), comparison, tmp_path / "file" / "worst.png")


def test_a_threshold_must_fit_both_brackets() -> None:
    """A bracket complains once no threshold fits, and names the slice that shows it."""
    reference, candidate = Bracket(), Bracket()
    reference.take(("a", 0), 0.5, 0.6)
    candidate.take(("b", 1), 0.55, 0.7)
    assert candidate.complaint("threshold", reference, 0.0, "") is None
    candidate.take(("b", 2), 0.65, 0.7)
    complaint = candidate.complaint("threshold", reference, 0.0, "0.5 to 0.6")
    assert complaint is not None
    assert (complaint.found, complaint.worst) == (0.65, ("b", 2))


@pytest.mark.parametrize(("least", "complains"), [(99, True), (100, False), (101, True)])
def test_the_count_that_turns_a_verdict_is_exact(least: int, complains: bool) -> None:
    """99 pixels that are negative and 100 that are positive fit a least count of 100, and no other."""
    masks = np.zeros((2, 20, 20), np.bool_)
    masks[0].flat[:99] = True
    masks[1].flat[:100] = True
    coherence = Coherence()
    coherence.take([("a", 0), ("a", 1)], Answers(masks, masks.sum(axis=(1, 2)), np.array([False, True]), None))
    assert bool(list(coherence.complaints("candidate", coherence, Calibration(0.5, least), 0.0))) == complains


def _manifest(**changes: object) -> Manifest:
    plain = Manifest(
        model="unet", file="model.onnx", model_sha256="", sources=(), precision="fp32", opset=20,
        window_hu={"centre": -600.0, "width": 1500.0}, calibration=CALIBRATION.as_dict(), parity={}, training={},
        versions={},
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_manifests_with_the_same_decision_give_it() -> None:
    """The precision may differ; thresholds and window may not."""
    assert same_decision(_manifest(), _manifest(precision="int8")) == CALIBRATION


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"calibration": {"probability_threshold": 0.61, "min_lesion_pixels": 64}}, "states the thresholds"),
        ({"calibration": {"probability_threshold": 0.6, "min_lesion_pixels": 65}}, "states the thresholds"),
        ({"calibration": {}}, "states the thresholds"),
        ({"window_hu": {"centre": -500.0, "width": 1500.0}}, "states the window"),
    ],
)
def test_manifests_that_decide_otherwise_are_refused(changes: dict[str, object], complaint: str) -> None:
    """Another threshold is another model, not a candidate for the place of this one."""
    with pytest.raises(ParityError, match=complaint):
        same_decision(_manifest(), _manifest(**changes))


@pytest.mark.parametrize("calibration", [{}, {"probability_threshold": 0.6}, {"temperature": 1.0}])
def test_manifests_without_thresholds_are_refused(calibration: dict[str, float]) -> None:
    """Both alike, and both useless."""
    with pytest.raises(ParityError, match="states no thresholds"):
        same_decision(_manifest(calibration=calibration), _manifest(calibration=calibration))
