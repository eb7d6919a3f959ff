"""`groundglass capacity`: from a benchmark's result to a deployment, and its memory model against a real server."""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from client_study import study_of
from command import assert_one_clear_line, groundglass
from groundglass.study import SliceSource
from groundglass_bench.memory import group_bytes
from groundglass_client.buffers import PREFIX, SHARED_MEMORY
from groundglass_client.connection import connect
from groundglass_client.session import analyse
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from probe_network import slices

PROJECT = Path(__file__).parents[2]
RESULTS = PROJECT / "benchmarks" / "results" / "bench-cpu"
REPOSITORY = PROJECT / "model_repository"
SIDE = 512
SLICES = 96
CLIENTS = 4


def planned(*arguments: str | Path, repository: Path = REPOSITORY) -> dict[str, dict]:
    """The command's JSON."""
    done = groundglass("capacity", "--json", "--repository", repository, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_measured_pace_comes_with_its_machine_and_date() -> None:
    """The pace is the served figure of the result, and the text says on what and when it was measured."""
    result = json.loads((RESULTS / "efficiency-1000.json").read_text())
    served = next(figure for figure in result["measured"]["figures"] if figure["name"] == "served")
    measured = ("--measured", RESULTS / "efficiency-1000.json", "--studies-per-hour", "12")
    assert planned(*measured)["replica"]["slices_per_s"] == served["median"]
    text = groundglass("capacity", "--repository", REPOSITORY, *measured).stdout
    for words in (result["host"]["date"], result["host"]["commit"], result["host"]["processor"], "no GPU"):
        assert words in text
    assert re.search(r"^GPUs +none", text, re.MULTILINE)


def test_the_configs_say_what_may_wait(tmp_path: Path) -> None:
    """The bound of memory follows from unet's queue and the aggregator's table as the repository configures them."""
    repository = tmp_path / "repository"
    shutil.copytree(REPOSITORY, repository, ignore=shutil.ignore_patterns("*.onnx"))
    load = ("--slices-per-s", "500", "--studies-per-hour", "60")
    before = planned(*load, repository=repository)
    for file, old, new in (
        ("unet", "max_queue_size: 128", "max_queue_size: 28"),
        ("scan_aggregator", '"1000"', '"500"'),
    ):
        config = repository / file / "config.pbtxt"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))
    after = planned(*load, repository=repository)
    memory, smaller = before["deployment"]["memory"], after["deployment"]["memory"]
    assert memory["queue_requests"] - smaller["queue_requests"] == 100
    assert memory["aggregator_bytes"] == 2 * smaller["aggregator_bytes"]
    assert memory["bound_bytes"] - smaller["bound_bytes"] == (
        100 * memory["request_bytes"] + smaller["aggregator_bytes"]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--measured"),
        (("--slices-per-s", "5", "--measured", RESULTS / "efficiency-1000.json"), "one of the two"),
        (("--measured", RESULTS / "ceiling.json"), "scenario ceiling"),
        (("--measured", RESULTS / "report.json"), "report.json"),
        (("--measured", "absent.json"), "absent.json"),
        (("--measured", PROJECT / "pyproject.toml"), "pyproject.toml"),
        (("--slices-per-s", "5", "--deadline-s", "30"), "100 s"),
        (("--slices-per-s", "nan"), "slices a second"),
        (("--slices-per-s", "5", "--repository", "nowhere"), "nowhere"),
    ],
)
def test_what_can_not_be_worked_out_is_one_clear_line(arguments: tuple[str | Path, ...], words: str) -> None:
    """A missing pace, a file that tells none, and a deadline that can't be met are each refused by name."""
    done = groundglass("capacity", "--studies-per-hour", "12", "--repository", REPOSITORY, *arguments)
    assert_one_clear_line(done, words)


def test_the_help_ends_in_a_runnable_example() -> None:
    """The example of the help runs as it stands."""
    help_text = groundglass("capacity", "--help").stdout
    example = help_text.strip().splitlines()[-1].partition("Example: groundglass ")[2]
    done = groundglass(*example.split(), "--repository", REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("replicas")


@pytest.fixture
def server(probe_repository: Path) -> Iterator[EmbeddedTriton]:
    """A server of its own: the regions of one that others used have grown."""
    with EmbeddedTriton(ServeSettings(probe_repository)) as started:
        yield started


@pytest.mark.triton
def test_a_real_server_keeps_within_the_predicted_memory(server: EmbeddedTriton) -> None:
    """Four clients at once: memory and the stages' regions keep to the prediction, a client's ring is exactly it."""
    load = ("--slices-per-s", "50", "--cpu", "--studies-per-hour", "12", "--slices-per-study", str(SLICES))
    memory = planned(*load, "--clients", str(CLIENTS))["deployment"]["memory"]
    hu = slices([True], SIDE)[0]

    def sent(number: int) -> None:
        with connect(server.grpc_address, shared_memory=False) as transport:
            analyse(study_of(SLICES, SIDE), transport, lambda source: hu)

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(sent, range(CLIENTS)))
    regions = sum(region.stat().st_size for region in SHARED_MEMORY.glob(f"{server.shm_prefix}*"))
    assert memory["stage_shm_bytes"] / 8 < regions <= memory["stage_shm_bytes"]
    assert memory["expected_bytes"] / 8 < group_bytes(server.pid) <= memory["expected_bytes"]
    assert ring_of_a_client(server, hu) == memory["client_shm_bytes"]


def ring_of_a_client(server: EmbeddedTriton, hu: np.ndarray) -> int:
    """Bytes of shared memory that one analysis in this process came to use."""
    seen: dict[str, int] = {}

    def decode(source: SliceSource) -> np.ndarray:
        for name in set(re.findall(rf"{PREFIX}\w+", Path("/proc/self/maps").read_text())):
            seen[name] = (SHARED_MEMORY / name).stat().st_size
        return hu

    with connect(server.grpc_address) as transport:
        assert transport.buffers().shared
        analyse(study_of(SLICES + 16, SIDE), transport, decode)
    return sum(seen.values())
