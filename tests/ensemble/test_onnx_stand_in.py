"""The ONNX Runtime stand-in serves repositories that know nothing of this project."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from calls import infer
from groundglass.errors import ServeFailed
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings

pytestmark = pytest.mark.triton

MIXED = """
backend: "onnxruntime"
input [
  { name: "TEXT" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "FLAG" data_type: TYPE_BOOL dims: [ -1 ] },
  { name: "HALF" data_type: TYPE_FP16 dims: [ -1, 2 ] }
]
output [
  { name: "TEXT_OUT" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "FLAG_OUT" data_type: TYPE_BOOL dims: [ -1 ] },
  { name: "PRODUCT" data_type: TYPE_FP16 dims: [ -1, -1 ] }
]
instance_group [ { kind: KIND_CPU } ]
parameters { key: "intra_op_thread_count" value: { string_value: "1" } }
"""
BATCHED = """
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "INDEX" data_type: TYPE_INT64 dims: [ 1 ] reshape { shape: [ ] } } ]
output [ { name: "SQUARE" data_type: TYPE_INT64 dims: [ 1 ] reshape { shape: [ ] } } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
dynamic_batching { max_queue_delay_microseconds: 200000 }
"""
PIECED = (
    BATCHED.replace("dynamic_batching { max_queue_delay_microseconds: 200000 }", "")
    + """
parameters { key: "intra_op_thread_count" value: { string_value: "1" } }
parameters { key: "rows_per_run" value: { string_value: "2" } }
parameters { key: "concurrent_runs" value: { string_value: "3" } }
dynamic_batching { max_queue_delay_microseconds: 100000 }
"""
)


def save(
    folder: Path, config: str, nodes: list[Any], tensors: tuple[list[Any], list[Any]], constants: list[Any]
) -> None:
    """One model of a repository."""
    graph = helper.make_graph(nodes, folder.name, *tensors, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config)
    onnx.save(model, folder / "1" / "model.onnx")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedTriton]:
    """A server of two models that have nothing to do with CT."""
    root = tmp_path_factory.mktemp("foreign")
    value = helper.make_tensor_value_info
    save(
        root / "mixed",
        MIXED,
        [
            helper.make_node("Identity", ["TEXT"], ["TEXT_OUT"]),
            helper.make_node("Not", ["FLAG"], ["FLAG_OUT"]),
            helper.make_node("Transpose", ["HALF"], ["turned"]),
            helper.make_node("MatMul", ["HALF", "turned"], ["PRODUCT"]),
        ],
        (
            [
                value("TEXT", TensorProto.STRING, ["n"]),
                value("FLAG", TensorProto.BOOL, ["n"]),
                value("HALF", TensorProto.FLOAT16, ["n", 2]),
            ],
            [
                value("TEXT_OUT", TensorProto.STRING, ["n"]),
                value("FLAG_OUT", TensorProto.BOOL, ["n"]),
                value("PRODUCT", TensorProto.FLOAT16, ["n", "n"]),
            ],
        ),
        [],
    )
    save_squares(root / "batched", BATCHED)
    save_squares(root / "pieced", PIECED)
    with EmbeddedTriton(ServeSettings(root)) as started:
        yield started


def save_squares(folder: Path, config: str) -> None:
    """A model that looks squares up, of numbers below 10 only."""
    value = helper.make_tensor_value_info
    squares = helper.make_tensor("squares", TensorProto.INT64, [10], [n * n for n in range(10)])
    save(
        folder,
        config,
        [helper.make_node("Gather", ["squares", "INDEX"], ["SQUARE"])],
        ([value("INDEX", TensorProto.INT64, ["n"])], [value("SQUARE", TensorProto.INT64, ["n"])]),
        [squares],
    )


def test_strings_bools_and_halves_pass_unchanged(server: EmbeddedTriton) -> None:
    """A model without batching gets and gives BYTES, BOOL and FP16 tensors as they are."""
    half = np.array([[1, 2], [3, 4]], dtype=np.float16)
    values: dict[str, NDArray[Any]] = {
        "TEXT": np.array([b"ground glass", "Lücke".encode()], dtype=np.object_),
        "FLAG": np.array([True, False]),
        "HALF": half,
    }
    answer = infer(server.grpc_address, "mixed", values)
    assert answer["TEXT_OUT"].tolist() == values["TEXT"].tolist()
    assert answer["FLAG_OUT"].tolist() == [False, True]
    assert answer["PRODUCT"].dtype == np.float16
    np.testing.assert_array_equal(answer["PRODUCT"], half @ half.T)


def test_only_the_outputs_asked_for_come_back(server: EmbeddedTriton) -> None:
    """Outputs that nobody asked for are neither computed nor sent."""
    values: dict[str, NDArray[Any]] = {
        "TEXT": np.array([b"a"], dtype=np.object_),
        "FLAG": np.array([True]),
        "HALF": np.ones((1, 2), dtype=np.float16),
    }
    assert set(infer(server.grpc_address, "mixed", values, ["FLAG_OUT"])) == {"FLAG_OUT"}


def test_text_that_is_no_utf8_is_refused(server: EmbeddedTriton) -> None:
    """Bytes that ONNX Runtime can't take as a string are an error of that request."""
    values: dict[str, NDArray[Any]] = {
        "TEXT": np.array([b"\xff"], dtype=np.object_),
        "FLAG": np.array([True]),
        "HALF": np.ones((1, 2), dtype=np.float16),
    }
    with pytest.raises(InferenceServerException, match="UTF-8"):
        infer(server.grpc_address, "mixed", values)


def test_requests_that_share_a_batch_fail_alone(server: EmbeddedTriton) -> None:
    """Of eight requests that wait together, the one with an index out of range is refused, and the others are right."""

    def ask(index: int) -> int | str:
        try:
            answer = infer(server.grpc_address, "batched", {"INDEX": np.array([[index]], dtype=np.int64)})
        except InferenceServerException as error:
            return str(error)
        assert answer["SQUARE"].shape == (1, 1)
        return int(answer["SQUARE"][0, 0])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [0, 1, 2, 99, 4, 5, 6, 7]))
    refused = answers.pop(3)
    assert answers == [0, 1, 4, 16, 25, 36, 49]
    assert isinstance(refused, str)
    assert "ONNX Runtime" in refused


def test_requests_cut_into_pieces_get_their_own_rows(server: EmbeddedTriton) -> None:
    """Requests of any number of rows, many at once, are put together again; a bad row fails its own request only."""

    def ask(number: int) -> list[int] | str:
        rows = [(number + row) % 10 for row in range(1 + number % 8)] + [99] * (number == 7)
        try:
            return infer(server.grpc_address, "pieced", {"INDEX": np.array(rows, np.int64)[:, None]})["SQUARE"][
                :, 0
            ].tolist()
        except InferenceServerException as error:
            return str(error)

    numbers = [number for number in range(40) if number % 8 != 7 or number == 7]
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(numbers, pool.map(ask, numbers), strict=True))
    refused = answers.pop(7)
    assert isinstance(refused, str)
    assert answers == {n: [((n + row) % 10) ** 2 for row in range(1 + n % 8)] for n in answers}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"2"', '"0"', "rows_per_run is '0': a number from 1"),
        ('"3"', '"many"', "concurrent_runs is 'many'"),
        ("max_batch_size: 8", "max_batch_size: 0", "needs batching"),
    ],
)
def test_pieces_that_can_t_be_are_refused_at_the_load(tmp_path: Path, old: str, new: str, words: str) -> None:
    """A model whose parameters make no pieces does not load, and the reason names the parameter."""
    config = PIECED.replace(old, new)
    if "max_batch_size: 0" in config:
        config = config.replace("reshape { shape: [ ] }", "").replace(config[config.index("dynamic_batching") :], "")
    save_squares(tmp_path / "pieced", config)
    with pytest.raises(ServeFailed, match=words), EmbeddedTriton(ServeSettings(tmp_path)):
        pass
