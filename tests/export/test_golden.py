"""Golden answers: what the reference said is kept whole, and a served version is held to it as the gate holds files."""

from __future__ import annotations

import math
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import logit_network
import probe_network
from groundglass.cli.slices import golden_scans
from groundglass.errors import ModelError, ParityError, RepositoryError, ServerUnreachable, SettingError
from groundglass.manifest import Manifest, Source, file_digest, write_manifest
from groundglass_export.answers import Answers
from groundglass_export.derivation import read_reference
from groundglass_export.engine import OnnxEngine, OnnxPreprocess
from groundglass_export.gate import GateReport, GateScan, require
from groundglass_export.gate.comparison import slice_digest
from groundglass_export.golden import Golden, GoldenScan, read_golden, write_golden
from groundglass_export.golden_recording import record_golden
from groundglass_export.served import Ask, GoldenEngine, verify_served

THRESHOLDS = {
    "probability_threshold": logit_network.PROBABILITY_THRESHOLD,
    "min_lesion_pixels": logit_network.MIN_LESION_PIXELS,
}
POSITIVES = [False, True, True, False, True]
HU = logit_network.noisy_slices(POSITIVES)
WIDE_HU = np.concatenate([logit_network.noisy_slices([True, False], seed=1)] * 2, axis=2)  # 64 rows, 128 columns


def _scan(name: str, hu: NDArray[np.int16]) -> GateScan:
    return GateScan(name, len(hu), hu.__getitem__)


SCANS = (_scan("chest", HU), _scan("wide", WIDE_HU))


def _reference(folder: Path, thresholds: dict[str, float] = THRESHOLDS) -> Path:
    """A small network in FP32 on disk, with its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(logit_network.unet(), path)
    write_manifest(path, Manifest(
        model="unet", file=path.name, model_sha256=file_digest(path), precision="fp32", opset=18,
        sources=(Source("checkpoint", "unet.safetensors", "ab" * 32),), calibration=thresholds,
        window_hu={"centre": -600.0, "width": 1500.0}, parity={}, training={}, versions={},
    ))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def preprocess(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph that makes the images."""
    path = tmp_path_factory.mktemp("preprocess") / "model.onnx"
    onnx.save(probe_network.preprocess(), path)
    return path


@pytest.fixture(scope="module")
def recorded(preprocess: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden answers of the small network to both scans. Shared: don't change it."""
    folder = tmp_path_factory.mktemp("golden")
    record_golden(read_reference(_reference(folder)), preprocess, SCANS, folder / "golden.npz")
    return folder / "golden.npz"


@pytest.fixture(scope="module")
def golden(recorded: Path) -> Golden:
    """The same, read."""
    return read_golden(recorded)


def _candidate(golden: Golden, **changes: object) -> Manifest:
    """The manifest of a version in FP16 that was made from the reference."""
    plain = Manifest(
        model="unet", file="model.plan", model_sha256="cd" * 32, precision="fp16", opset=18,
        sources=(Source("checkpoint", "unet.safetensors", "ab" * 32), golden.reference),
        calibration=golden.calibration, window_hu=golden.window_hu, parity={}, training={}, versions={},
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def _asked(model: onnx.ModelProto) -> Ask:
    """What a server does with slices, as far as a client sees it."""
    window, engine = OnnxPreprocess(probe_network.preprocess()), OnnxEngine(model)
    return lambda hu: replace(engine.answers(np.stack([window.image(one) for one in hu])), probability=None)


def _verified(golden: Golden, folder: Path, model: onnx.ModelProto | None = None, **changes: object) -> GateReport:
    ask = _asked(logit_network.unet() if model is None else model)
    return verify_served(golden, _candidate(golden, **changes), ask, SCANS, evidence=folder)


def test_what_was_recorded_is_read_back(golden: Golden, recorded: Path, tmp_path: Path) -> None:
    """Masks, counts and verdicts are those of the reference; read and written again, the file is the same."""
    engine, window = OnnxEngine(logit_network.unet()), OnnxPreprocess(probe_network.preprocess())
    assert [(scan.name, scan.count, scan.phantom) for scan in golden.scans] == [("chest", 5, None), ("wide", 2, None)]
    for index, hu in enumerate(HU):
        expected, found = engine.answers(window.image(hu)[None]), golden.scans[0].answer(index)
        assert (found.mask == expected.mask).all()
        assert (found.pixels, found.positive) == (expected.pixels, expected.positive)
    assert golden.calibration == THRESHOLDS
    assert golden.reference == Source("fp32", "model.onnx", file_digest(recorded.parent / "model.onnx"))
    assert write_golden(golden, tmp_path / "again.npz").read_bytes() == recorded.read_bytes()
    assert recorded.stat().st_size < HU.nbytes / 4


def test_a_phantom_keeps_its_settings(preprocess: Path, recorded: Path, tmp_path: Path) -> None:
    """They stay with the scan that they make, so that it can be made again."""
    reference = read_reference(recorded.parent / "model.onnx")
    record_golden(reference, preprocess, SCANS, tmp_path / "g.npz", phantoms={"wide": {"slices": 2, "lesion": (0, 1)}})
    assert [scan.phantom for scan in read_golden(tmp_path / "g.npz").scans] == [None, {"slices": 2, "lesion": [0, 1]}]


@given(st.lists(st.integers(0, len(HU) - 1), min_size=1, max_size=9))
@settings(max_examples=20)
def test_golden_answers_are_found_by_content(order: list[int]) -> None:
    """Any slices in any order and any number get the answers that were recorded of them."""
    masks = np.packbits(np.random.default_rng(0).random((len(HU), 512, 512)) < 0.1, axis=2)
    digests = tuple(slice_digest(hu) for hu in HU)
    scan = GoldenScan("chest", digests, masks, np.arange(len(HU), dtype=np.int32), np.array(POSITIVES))
    engine = GoldenEngine(Golden(Source("fp32", "model.onnx", "ab"), "", {}, {}, {}, (scan,)))
    found = engine.answers(HU[order])
    assert found.pixels.tolist() == order
    assert (np.packbits(found.mask, axis=2) == masks[order]).all()
    with pytest.raises(ModelError, match="no golden answer to a slice of SHA-256"):
        engine.answers(HU[order] + np.int16(1))


def test_an_equivalent_version_passes(golden: Golden, tmp_path: Path) -> None:
    """Scans of two sizes, the evidence written, and what could not be seen noted."""
    report = _verified(golden, tmp_path)
    assert report.passed, report.as_text()
    assert (report.overall.slices, report.overall.positive_slices, report.overall.mean_dice) == (7, 4, 1.0)
    assert report.candidate.precision == "fp16"
    assert any("does not show its probabilities" in note for note in report.notes)
    assert (tmp_path / "worst_slice.png").stat().st_size > 10_000
    assert (tmp_path / "parity.json").is_file()


def test_the_reference_itself_passes_when_it_is_served(golden: Golden, tmp_path: Path) -> None:
    """Its manifest names no FP32 graph that it comes from: it is that graph."""
    digest = golden.reference.sha256
    report = _verified(golden, tmp_path, precision="fp32", model_sha256=digest, sources=(), file="model.onnx")
    assert report.passed, report.as_text()


def _threshold(model: onnx.ModelProto) -> None:
    probability = logit_network.PROBABILITY_THRESHOLD + 0.05
    logit_network.set_constant(model, "threshold", np.float32(math.log(probability / (1 - probability))))


def _other_in_large_batches(model: onnx.ModelProto) -> None:
    """Beyond four slices, logits fall with the size of the batch."""
    for name, value in (("first", np.array([0], np.int64)), ("four", np.float32(4)), ("gain", np.float32(50))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    nodes = [
        helper.make_node("Shape", ["IMAGE"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["size"]),
        helper.make_node("Cast", ["size"], ["batch"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Sub", ["batch", "four"], ["beyond"]),
        helper.make_node("Relu", ["beyond"], ["surplus"]),
        helper.make_node("Mul", ["surplus", "gain"], ["fall"]),
    ]
    logit_network.with_node_after(
        model, "LOGITS", lambda before, after: [*nodes, helper.make_node("Sub", [before, "fall"], [after])]
    )


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (logit_network.noisy_weights, "mean dice of positive slices"),
        (_threshold, "change of all lesion pixels"),
        (logit_network.more_pixels, "lesion pixels that turn SLICE_POSITIVE"),
        (logit_network.reversed_bits, "mean dice of positive slices"),
        (logit_network.miscounted, "slices whose LESION_PIXELS are not those of MASK"),
        (_other_in_large_batches, "slices answered otherwise in a batch of 8 than alone"),
    ],
)
def test_a_damaged_version_fails(
    damage: Callable[[onnx.ModelProto], None], complaint: str, golden: Golden, tmp_path: Path
) -> None:
    """Weights, thresholds, bit order, counts, batches: refused, with a picture of the worst slice."""
    model = logit_network.unet()
    damage(model)
    report = _verified(golden, tmp_path, model)
    assert complaint in "; ".join(found.figure for found in report.complaints)
    with pytest.raises(ParityError, match=r"Worst slice: (chest|wide) slice \d"):
        require(report)
    assert (tmp_path / "worst_slice.png").is_file()


def test_limits_are_those_of_the_precision_that_the_manifest_states(golden: Golden, tmp_path: Path) -> None:
    """The same answers pass as INT8 and fail as FP32; a precision without limits proves nothing."""
    model = logit_network.unet()
    probability = logit_network.PROBABILITY_THRESHOLD + 0.01
    logit_network.set_constant(model, "threshold", np.float32(math.log(probability / (1 - probability))))
    assert _verified(golden, tmp_path, model, precision="int8").passed
    assert not _verified(golden, tmp_path, model, precision="fp32").passed
    with pytest.raises(ParityError, match="of precision fp8; there are limits for"):
        _verified(golden, tmp_path, model, precision="fp8")


def test_a_version_of_another_reference_is_refused(golden: Golden, tmp_path: Path) -> None:
    """The error names the reference of the golden answers, and what the version was made from."""
    other = Source("fp32", "other.onnx", "ef" * 32)
    with pytest.raises(ParityError, match=r"those of model\.onnx \(\w{12}\), .* model\.plan .* other\.onnx \(efefef"):
        _verified(golden, tmp_path, sources=(other,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"calibration": {**THRESHOLDS, "min_lesion_pixels": 65}}, "states the thresholds"),
        ({"window_hu": {"centre": -500.0, "width": 1500.0}}, "states the window"),
    ],
)
def test_a_version_that_decides_otherwise_is_refused(
    changes: dict[str, object], complaint: str, golden: Golden, tmp_path: Path
) -> None:
    """Another threshold or window in its manifest is another model, whatever it answers."""
    with pytest.raises(ParityError, match=complaint):
        _verified(golden, tmp_path, **changes)


def _changed() -> NDArray[np.int16]:
    changed = HU.copy()
    changed[3, 0, 0] += 1
    return changed


@pytest.mark.parametrize(
    ("scans", "words"),
    [
        ((_scan("chest", _changed()), SCANS[1]), "chest slice 3 is not the slice"),
        ((_scan("chest", HU[[1, 0, 2, 3, 4]]), SCANS[1]), "chest slice 0 is not the slice"),
        ((_scan("chest", HU[:4]), SCANS[1]), r"chest \(5 slices\), wide .*; given were chest \(4 slices\), wide"),
        ((SCANS[0],), r"given were chest \(5 slices\): give what was recorded"),
        ((SCANS[0], SCANS[0]), "given were chest .*, chest"),
        ((SCANS[0], _scan("other", WIDE_HU)), "given were chest .*, other"),
        ((), "given were no scan"),
    ],
)
def test_other_slices_than_those_recorded_are_refused(
    scans: tuple[GateScan, ...], words: str, golden: Golden, tmp_path: Path
) -> None:
    """Another value, order, number or name of slices: the error names scan and slice."""
    with pytest.raises(ParityError, match=words):
        verify_served(golden, _candidate(golden), _asked(logit_network.unet()), scans, evidence=tmp_path)


def test_the_order_of_scans_does_not_matter(golden: Golden, tmp_path: Path) -> None:
    """Studies may be given in another order than they were recorded in: the report is the same."""
    ask, candidate = _asked(logit_network.unet()), _candidate(golden)
    reports = [verify_served(golden, candidate, ask, scans, evidence=tmp_path) for scans in (SCANS, SCANS[::-1])]
    assert reports[0] == reports[1]


def _fails(error: Exception) -> Ask:
    def ask(hu: NDArray[np.int16]) -> Answers:
        raise error

    return ask


def _small_masks(hu: NDArray[np.int16]) -> Answers:
    return Answers(
        np.zeros((len(hu), 64, 64), np.bool_), np.zeros(len(hu), np.int32), np.zeros(len(hu), np.bool_), None
    )


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (_fails(ServerUnreachable("nobody at localhost:1")), ServerUnreachable, "nobody at localhost:1"),
        (_fails(ModelError("out of memory")), ParityError, "fp16 unet 3, .*no answer, so nothing is proved: out of"),
        (_small_masks, ParityError, r"unet 3 answered masks of shape \(4, 64, 64\)"),
    ],
)
def test_a_server_that_does_not_answer_proves_nothing(
    ask: Ask, error: type[Exception], words: str, golden: Golden, tmp_path: Path
) -> None:
    """A server's failure stays one; an answer that is none is refused, under the name that the caller gave."""
    with pytest.raises(error, match=words):
        verify_served(golden, _candidate(golden), ask, SCANS, evidence=tmp_path, name="unet 3")


def test_every_damage_to_the_file_is_found(recorded: Path, golden: Golden, tmp_path: Path) -> None:
    """Wherever a byte is changed or the file cut, it is refused by name, or still says the same."""
    whole, damaged = recorded.read_bytes(), tmp_path / "golden.npz"
    refused = 0
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :]):
            damaged.write_bytes(content)
            try:
                found = read_golden(damaged)
            except RepositoryError as error:
                refused += str(damaged) in str(error)
            else:
                assert write_golden(found, tmp_path / "same.npz").read_bytes() == whole
    assert refused > 150


def _with_member(recorded: Path, out: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(recorded) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.namelist():
            new.writestr(member, content if member == name else old.read(member))
    return out


def test_files_that_are_something_else_are_refused(recorded: Path, golden: Golden, tmp_path: Path) -> None:
    """Missing, a folder, another archive, another format, another number of rows: one line that names the file."""
    with pytest.raises(RepositoryError, match=r"nowhere\.npz: no golden answers there"):
        read_golden(tmp_path / "nowhere.npz")
    with pytest.raises(RepositoryError, match="no golden answers there"):
        read_golden(tmp_path)
    np.savez(tmp_path / "other.npz", masks=np.zeros(3))
    with pytest.raises(RepositoryError, match=r"other\.npz holds no golden answers"):
        read_golden(tmp_path / "other.npz")
    np.save(tmp_path / "pixels.npy", golden.scans[0].pixels)
    few = _with_member(recorded, tmp_path / "few.npz", "pixels.npy", (tmp_path / "pixels.npy").read_bytes())
    with pytest.raises(RepositoryError, match=r"few\.npz .* pixels is int32 \(5,\), expected int32, 7 rows"):
        read_golden(few)
    np.save(tmp_path / "about.npy", np.frombuffer(b'{"format": 9}', np.uint8))
    newer = _with_member(recorded, tmp_path / "newer.npz", "about.npy", (tmp_path / "about.npy").read_bytes())
    with pytest.raises(RepositoryError, match=r"newer\.npz .* format 9; this version reads 1"):
        read_golden(newer)


def test_a_file_that_cannot_be_written_is_one_clear_line(golden: Golden, tmp_path: Path) -> None:
    """A file where a folder should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RepositoryError, match=r"golden\.npz was not written"):
        write_golden(golden, tmp_path / "file" / "golden.npz")


def test_a_reference_that_makes_no_sense_is_not_recorded(preprocess: Path, tmp_path: Path) -> None:
    """One that contradicts its manifest, or finds nothing: refused, and no file."""
    out = tmp_path / "golden.npz"
    wrong = read_reference(_reference(tmp_path / "wrong", {**THRESHOLDS, "probability_threshold": 0.3}))
    with pytest.raises(ParityError, match=r"contradicts itself or its manifest, .* probability threshold of MASK"):
        record_golden(wrong, preprocess, SCANS, out)
    right = read_reference(_reference(tmp_path / "right"))
    with pytest.raises(ParityError, match="finds no positive slice in these 2"):
        record_golden(right, preprocess, [_scan("healthy", logit_network.noisy_slices([False] * 2))], out)
    with pytest.raises(ParityError, match="no scan at all"):
        record_golden(right, preprocess, [], out)
    assert not out.exists()


JUDGE_WITHOUT_RUNTIMES = """
import sys
for name in ("onnx", "onnxruntime", "torch", "tensorrt", "tensorrt_rtx", "onnxscript", "modelopt", "safetensors"):
    sys.modules[name] = None
from pathlib import Path
import numpy as np
from groundglass.manifest import Manifest
from groundglass_export.gate import GateScan, require
from groundglass_export.gate.comparison import slice_digest
from groundglass_export.golden import read_golden
from groundglass_export.served import GoldenEngine, verify_served
folder = Path(sys.argv[1])
golden, hu, wide = read_golden(folder / "golden.npz"), np.load(folder / "hu.npy"), np.load(folder / "wide.npy")
candidate = Manifest(
    model="unet", file="model.plan", model_sha256="cd" * 32, precision="fp16", opset=18, sources=(golden.reference,),
    calibration=golden.calibration, window_hu=golden.window_hu, parity={}, training={}, versions={},
)
scans = [GateScan("chest", len(hu), hu.__getitem__), GateScan("wide", len(wide), wide.__getitem__)]
report = verify_served(golden, candidate, GoldenEngine(golden).answers, scans, evidence=folder)
require(report)
print(report.as_text())
"""


def test_a_version_is_judged_without_any_runtime(recorded: Path, tmp_path: Path) -> None:
    """The base install has no onnx, onnxruntime, torch or tensorrt: gate, golden answers and pictures do without."""
    (tmp_path / "golden.npz").write_bytes(recorded.read_bytes())
    np.save(tmp_path / "hu.npy", HU)
    np.save(tmp_path / "wide.npy", WIDE_HU)
    command = [sys.executable, "-c", JUDGE_WITHOUT_RUNTIMES, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\nequivalent\n")


def test_scans_come_from_the_record_or_from_the_user(golden: Golden, tmp_path: Path) -> None:
    """A phantom is made again; a study that was recorded must be named; settings of no phantom are refused."""
    phantom = replace(golden.scans[0], name="made", phantom={"slices": 3, "lesion": [1, 2], "rows": 64, "columns": 80})
    with golden_scans(replace(golden, scans=(phantom,)), []) as (scan,):
        assert (scan.name, scan.count, scan.hu(1).shape) == ("made", 3, (64, 80))
        assert scan.hu(1).dtype == np.int16
    with pytest.raises(SettingError, match="of the study chest: name it with --study"), golden_scans(golden, []):
        pass
    for wrong in ({"slices": 3, "colour": 1}, {"slices": "3"}, {"slices": 3, "lesion": 1}):
        damaged = replace(golden, scans=(replace(phantom, phantom=wrong),))
        with pytest.raises(RepositoryError, match="no phantom has the settings"), golden_scans(damaged, []):
            pass
