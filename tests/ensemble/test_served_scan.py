"""The ensemble on a real Triton: the verdict of the fold, refusals, metrics."""

from __future__ import annotations

import itertools
import re
import urllib.request
import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from calls import infer, scan_rows
from groundglass import contract
from groundglass.finding import fold
from groundglass_ensemble.embedded import EmbeddedTriton
from probe_network import POSITIVE_PIXELS

pytestmark = pytest.mark.triton

CT_SCAN = contract.CT_SCAN.name
OUTPUTS = [tensor.name for tensor in contract.CT_SCAN.outputs]


def new_study() -> bytes:
    """A key that no other test uses."""
    return uuid.uuid4().bytes.hex().encode()


def metric(server: EmbeddedTriton, name: str, labels: str = "") -> float:
    """The value of one custom metric."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.search(rf"^{name}{re.escape(labels)} (\S+)$", text, re.MULTILINE)
    assert found is not None, f"no metric {name}{labels}"
    return float(found[1])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.data())
def test_any_order_and_chunking_gives_the_fold(
    probe_server: EmbeddedTriton, positives: list[bool], data: st.DataObject
) -> None:
    """Two scans whose chunks come shuffled, repeated and interleaved each get the verdict of the plain fold."""
    scans = {new_study(): positives, new_study(): [not positive for positive in positives]}
    rows = [(study, index) for study in scans for index in range(len(positives))]
    order = data.draw(st.permutations(rows + rows[:3]))
    size = data.draw(st.integers(5, 64))
    last = {}
    for start in range(0, len(order), size):
        for study in scans:
            indices = [index for key, index in order[start : start + size] if key == study]
            if indices:
                last[study] = infer(probe_server.grpc_address, CT_SCAN, scan_rows(study, indices, scans[study]))
    for study, verdicts in scans.items():
        expected = fold(enumerate(verdicts), len(verdicts))
        answer = {name: values.ravel()[-1] for name, values in last[study].items()}
        assert answer[contract.LONGEST_RUN.name] == expected.longest_run
        assert answer[contract.SLICES_SEEN.name] == expected.slices_seen
        assert answer[contract.SCAN_COMPLETE.name]
        assert answer[contract.SCAN_POSITIVE.name] == expected.positive


def test_every_row_answers_for_its_slice(probe_server: EmbeddedTriton) -> None:
    """Mask, lesion pixels and verdict are those of the row's own slice, and agree with one another."""
    positives = [True, False, True]
    answer = infer(probe_server.grpc_address, CT_SCAN, scan_rows(new_study(), [2, 1, 0], positives))
    bits = np.unpackbits(answer[contract.MASK.name], axis=-1).sum(axis=(1, 2))
    pixels = answer[contract.LESION_PIXELS.name].ravel()
    assert pixels.tolist() == bits.tolist()
    assert (pixels >= POSITIVE_PIXELS).tolist() == answer[contract.SLICE_POSITIVE.name].ravel().tolist() == positives


def test_any_choice_of_outputs_is_served(probe_server: EmbeddedTriton) -> None:
    """Each of the 127 ways to ask for some outputs is answered with exactly those."""
    for size in range(1, len(OUTPUTS) + 1):
        for chosen in itertools.combinations(OUTPUTS, size):
            answer = infer(probe_server.grpc_address, CT_SCAN, scan_rows(b"", [0], [True]), chosen)
            assert set(answer) == set(chosen)


def test_a_contradiction_is_refused_and_changes_nothing(probe_server: EmbeddedTriton) -> None:
    """Another slice count, an index out of range and a changed verdict are refused by name; the study goes on."""
    study, address = new_study(), probe_server.grpc_address
    infer(address, CT_SCAN, scan_rows(study, [0, 1], [True] * 4))
    beyond = scan_rows(study, [1], [True] * 4) | {contract.SLICE_INDEX.name: np.array([[4]], dtype=np.int32)}
    for bad, words in (
        (scan_rows(study, [2], [True] * 3), "slice count 3"),
        (beyond, "slice index 4"),
        (scan_rows(study, [1], [False] * 4), "slice 1 was positive and is now negative"),
    ):
        with pytest.raises(InferenceServerException, match=words) as refusal:
            infer(address, CT_SCAN, bad)
        assert "INVALID_ARGUMENT" in refusal.value.status()
    answer = infer(address, CT_SCAN, scan_rows(study, [2, 3], [True] * 4))
    assert answer[contract.LONGEST_RUN.name].ravel().tolist() == [4, 4]


def test_a_whole_scan_folds_in_one_request(probe_server: EmbeddedTriton) -> None:
    """The aggregator takes all verdicts of a four-thousand-slice scan at once, as a client sends them again."""
    count = 4000
    positives = np.arange(count) % 100 < 40
    values = {
        contract.STUDY.name: np.full((count, 1), new_study(), dtype=np.object_),
        contract.SLICE_INDEX.name: np.arange(count, dtype=np.int32)[:, None],
        contract.SLICE_COUNT.name: np.full((count, 1), count, dtype=np.int32),
        contract.SLICE_POSITIVE.name: positives[:, None],
    }
    answer = infer(probe_server.grpc_address, contract.SCAN_AGGREGATOR.name, values)
    assert set(answer[contract.LONGEST_RUN.name].ravel().tolist()) == {40}
    assert answer[contract.SCAN_COMPLETE.name].all()


def test_metrics_count_scans_and_never_probes(probe_server: EmbeddedTriton) -> None:
    """A finished scan is counted once under its verdict, an open one in the gauge, a probe nowhere."""
    scans, opened = "groundglass_scans_total", "groundglass_open_studies"
    before = metric(probe_server, scans, '{verdict="positive"}'), metric(probe_server, opened)
    study, positives = new_study(), [True] * contract.POSITIVE_RUN
    infer(probe_server.grpc_address, CT_SCAN, scan_rows(b"", [0], [True]))
    infer(probe_server.grpc_address, CT_SCAN, scan_rows(study, [0], positives))
    assert metric(probe_server, opened) == before[1] + 1
    for _ in range(2):
        infer(probe_server.grpc_address, CT_SCAN, scan_rows(study, range(len(positives)), positives))
    after = metric(probe_server, scans, '{verdict="positive"}'), metric(probe_server, opened)
    assert after == (before[0] + 1, before[1])
    assert study.decode() not in probe_server.log_file.read_text()
