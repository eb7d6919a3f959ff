"""Versions are swapped on a real Triton while studies are on their way: every report is of one version, and right."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray

import probe_network
from client_study import study_of
from command import groundglass
from groundglass import contract
from groundglass.errors import VersionGone
from groundglass.report import ScanReport
from groundglass.study import SliceSource
from groundglass_client.canary import Canary
from groundglass_client.chunk import Chunk
from groundglass_client.phantom import PhantomSettings, write_phantom
from groundglass_client.requests import scan_request
from groundglass_client.session import SessionSettings, analyse
from groundglass_client.transport import GrpcTransport, ServedScan
from groundglass_ensemble.embedded import EmbeddedTriton, ServeSettings
from groundglass_ensemble.versions import VersionFolder

pytestmark = pytest.mark.triton

MODELS = Path(__file__).parents[2] / "model_repository"
SIDE = 32
SMALL, LARGE = 2, 8
"""Sides of the marked squares, of a slice of 32: 1,024 and 16,384 of the 512x512 pixels."""
VERSION_2_PIXELS = 4096
"""Version 1 calls both positive, version 2 the large ones only."""

SIDES = [0] * 10 + [SMALL] * 12 + [LARGE] * 18 + [SMALL] * 20 + [0] * 12
STUDY = study_of(len(SIDES), SIDE)
POSITIVE = {"1": [side > 0 for side in SIDES], "2": [side == LARGE for side in SIDES]}
RUNS = {"1": 50, "2": 18}
HOW = SessionSettings(chunk_bytes=2 * SIDE * SIDE * 2, window=2, decode_workers=1)
PATIENCE_S = 60.0


def decode(source: SliceSource) -> NDArray[np.int16]:
    """A slice with a square that both versions, one or none of them call positive."""
    hu = np.full((SIDE, SIDE), -1000, np.int16)
    hu[: SIDES[source.index], : SIDES[source.index]] = probe_network.LESION_HU + 40
    return hu


def check(report: ScanReport) -> None:
    """Every slice, and the scan, are what the report's version says of them."""
    assert [result.positive for result in report.slices] == POSITIVE[report.model_version]
    assert (report.longest_run, report.slice_count) == (RUNS[report.model_version], len(SIDES))


def add_version_2(repository: Path) -> None:
    """A network that needs more pixels to call a slice positive."""
    (repository / "unet" / "2").mkdir()
    onnx.save(probe_network.unet(VERSION_2_PIXELS), repository / "unet" / "2" / "model.onnx")


@dataclass
class Swapper:
    """A repository, the server on it, and the steps of a swap."""

    repository: Path
    server: EmbeddedTriton
    client: triton.InferenceServerClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = triton.InferenceServerClient(self.server.grpc_address)

    def promote(self, version: int) -> None:
        """From now on ``ct_scan`` is this version."""
        VersionFolder(self.repository).set_live(version)
        self.client.load_model("ct_scan")

    def retire_version_1(self) -> None:
        """Take away the name of version 1, and then the version."""
        self.client.unload_model("ct_scan_v1")
        folder = VersionFolder(self.repository)
        folder.remove_pinned(1)
        folder.set_loaded([2])
        self.client.load_model("unet")


def two_versions(repository: Path) -> Path:
    """A repository of two versions, each with its name; version 1 is live."""
    probe_network.build_repository(MODELS, repository)
    add_version_2(repository)
    folder = VersionFolder(repository)
    folder.set_loaded([1, 2])
    folder.set_live(1)
    for version in (1, 2):
        folder.add_pinned(version)
    return repository


@pytest.fixture(scope="module")
def swapper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swapper]:
    """A server of two versions, each with its name. Shared: promote version 1 again."""
    repository = two_versions(tmp_path_factory.mktemp("pinned") / "repository")
    with EmbeddedTriton(ServeSettings(repository, control="explicit")) as server:
        swapper = Swapper(repository, server)
        yield swapper
        swapper.client.close()


@pytest.fixture
def transport(swapper: Swapper) -> Iterator[GrpcTransport]:
    """A way to the shared server."""
    with GrpcTransport(swapper.server.grpc_address) as transport:
        yield transport


class Heard:
    """What a study's progress told; does something once, in the middle of the study."""

    def __init__(self, in_the_middle: Callable[[], None]) -> None:
        self.in_the_middle, self.slices, self.done = in_the_middle, list[int](), False

    def __call__(self, slices: int) -> None:
        self.slices.append(slices)
        if sum(self.slices) >= len(SIDES) // 3 and not self.done:
            self.done = True
            self.in_the_middle()


def test_a_server_says_which_version_is_live_and_which_have_names(swapper: Swapper, transport: GrpcTransport) -> None:
    """The live version is the one in ct_scan, not the newest; names are told as long as they are loaded."""
    both = frozenset({"1", "2"})
    assert transport.describe(10.0) == ServedScan("1", contract.POSITIVE_RUN, both)
    swapper.promote(2)
    assert transport.describe(10.0).model_version == "2"
    swapper.promote(-1)
    assert transport.describe(10.0).model_version == "2"
    swapper.promote(1)
    swapper.client.unload_model("ct_scan_v2")
    assert transport.describe(10.0).pinned == {"1"}
    swapper.client.load_model("ct_scan_v2")
    assert transport.describe(10.0) == ServedScan("1", contract.POSITIVE_RUN, both)


def test_a_version_without_a_name_is_gone(swapper: Swapper, transport: GrpcTransport) -> None:
    """A request that asks by name for a version that is not there is refused with the model and the server."""
    chunk = Chunk(np.zeros(1, np.int32), np.zeros((1, SIDE, SIDE), np.int16))
    request = scan_request(chunk, "gone", 1, masks=False, model=contract.pinned("9"))
    with pytest.raises(VersionGone, match=f"ct_scan_v9 at {swapper.server.grpc_address}"):
        transport.send(request, 10.0).result()


def test_promotions_under_load_mix_no_study(swapper: Swapper, transport: GrpcTransport) -> None:
    """While ct_scan goes from version to version, every study is answered by the one that was live at its start."""
    reports: list[ScanReport] = []
    failures: list[BaseException] = []
    begun_again: list[int] = []
    stop = threading.Event()

    def analyse_studies() -> None:
        try:
            while not stop.is_set():
                heard = Heard(lambda: None)
                reports.append(analyse(STUDY, transport, decode, HOW, heard).report)
                begun_again.extend(count for count in heard.slices if count < 0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=analyse_studies) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for version in (2, 1) * 4:
            swapper.promote(version)
            before, deadline = len(reports), time.monotonic() + PATIENCE_S
            while not any(report.model_version == str(version) for report in reports[before:]):
                assert not failures
                assert time.monotonic() < deadline, f"no study of version {version}, which was promoted"
                time.sleep(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert not begun_again
    for report in reports:
        check(report)


def test_a_name_loaded_again_costs_a_study_nothing(swapper: Swapper, transport: GrpcTransport) -> None:
    """A study goes on while the ensemble that it is sent to is loaded over itself."""

    def reload() -> None:
        for _ in range(5):
            VersionFolder(swapper.repository).touch("ct_scan_v1")
            swapper.client.load_model("ct_scan_v1")

    heard = Heard(reload)
    report = analyse(STUDY, transport, decode, HOW, heard).report
    assert (report.model_version, heard.done) == ("1", True)
    assert min(heard.slices) > 0
    check(report)


def test_a_canary_answers_a_whole_study(transport: GrpcTransport) -> None:
    """A study that the canary takes is the candidate's, all of it, though another version is live."""
    settings = SessionSettings(chunk_bytes=HOW.chunk_bytes, canary=Canary("2", 1.0))
    report = analyse(STUDY, transport, decode, settings).report
    assert report.model_version == "2"
    check(report)


def test_analyze_asks_for_a_version(swapper: Swapper, tmp_path: Path) -> None:
    """--model-version has that version answer, and the report says so; --canary may."""
    write_phantom(PhantomSettings(slices=4), tmp_path / "study")
    for option, value in (("--model-version", "2"), ("--canary", "2:1")):
        server = swapper.server.grpc_address
        done = groundglass("analyze", tmp_path / "study", "--server", server, option, value, "--json", "-")
        assert json.loads(done.stdout)["model_version"] == "2", done.stderr


def test_a_version_taken_away_in_the_middle_is_not_in_the_report(tmp_path: Path) -> None:
    """When version 1 is retired under a study, version 2 answers every slice of it."""
    repository = two_versions(tmp_path / "repository")
    with EmbeddedTriton(ServeSettings(repository, control="explicit")) as server:
        swapper = Swapper(repository, server)

        def swap() -> None:
            swapper.promote(2)
            swapper.retire_version_1()
            swapper.client.close()

        heard = Heard(swap)
        with GrpcTransport(server.grpc_address) as transport:
            report = analyse(STUDY, transport, decode, HOW, heard).report
            assert transport.describe(10.0).pinned == {"2"}
    assert (report.model_version, sum(heard.slices)) == ("2", len(SIDES))
    assert min(heard.slices) < 0
    check(report)


def test_a_newer_version_on_a_plain_repository_answers_the_study_from_its_start(tmp_path: Path) -> None:
    """Where no version has a name, one that is loaded under a study has it computed again: never a mixture."""
    repository = probe_network.build_repository(MODELS, tmp_path / "repository")
    with EmbeddedTriton(ServeSettings(repository, control="explicit")) as server:
        client = triton.InferenceServerClient(server.grpc_address)

        def load() -> None:
            add_version_2(repository)
            client.load_model("unet")
            client.close()

        heard = Heard(load)
        with GrpcTransport(server.grpc_address) as transport:
            assert transport.describe(10.0) == ServedScan("1", contract.POSITIVE_RUN)
            report = analyse(STUDY, transport, decode, HOW, heard).report
    assert (report.model_version, sum(heard.slices)) == ("2", len(SIDES))
    assert min(heard.slices) < 0
    check(report)


def test_a_canary_of_a_fifth_answers_its_share_of_200_studies(transport: GrpcTransport) -> None:
    """The candidate's count is what chance gives at 0.2, and each study is wholly of the version that it names."""
    offset, count = 8, 6  # slices that neither, one or both versions call positive
    plain = study_of(count, SIDE)
    settings = SessionSettings(masks=False, decode_workers=1, canary=Canary("2", 0.2))
    versions = []
    for number in range(200):
        study = replace(plain, series=replace(plain.series, series_instance_uid=f"1.2.826.0.1.3680043.{number}"))
        report = analyse(
            study, transport, lambda source: decode(replace(source, index=source.index * 4 + offset)), settings
        )
        found = report.report
        expected = POSITIVE[found.model_version][offset : offset + 4 * count : 4]
        assert [item.positive for item in found.slices] == expected
        versions.append(found.model_version)
    assert POSITIVE["1"][offset : offset + 4 * count : 4] != POSITIVE["2"][offset : offset + 4 * count : 4]
    # 99.9 % of all draws of 200 at 0.2 lie between (binomial; 0.05 % on either side).
    assert 22 <= versions.count("2") <= 59
    assert versions.count("1") + versions.count("2") == 200
