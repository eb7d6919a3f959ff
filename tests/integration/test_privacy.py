"""Nobody's name or number reaches a log or a metric: planted in DICOM headers and file names, looked for everywhere.

The rule, which docs/operations.md states: a command's own result (its one line of error, its report) may name the file
at fault, as its caller named it; the report may name the series. Logs of client, server and balancer, and metrics, name
neither; and nothing ever names a patient.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pydicom
import pytest
import tritonclient.grpc as triton
from pydicom.uid import UID
from tritonclient.utils import InferenceServerException

from balancer import Balancer, balancer, replica_settings
from command import assert_one_clear_line, groundglass
from groundglass_bench.networks import waiting_repository
from groundglass_client.phantom import PhantomSettings, write_phantom
from groundglass_client.requests import fold_request
from groundglass_client.transport import _inputs
from groundglass_ensemble.embedded import EmbeddedTriton
from waiting import wait_until

pytestmark = pytest.mark.triton

REPOSITORY = Path(__file__).parents[2] / "model_repository"
UID_ROOT = "1.2.826.0.1.3680043.8.498.7770777"
SERIES, OTHER_SERIES = f"{UID_ROOT}.2", f"{UID_ROOT}.4"
PERSON = {
    "PatientName": "Zanzibar^Quixote",
    "PatientID": "PID-7781-XYZZY",
    "PatientBirthDate": "19370229",
    "AccessionNumber": "ACC-5512-PLUGH",
    "ReferringPhysicianName": "Nimrod^Thessaly",
    "InstitutionName": "Ambergris Infirmary",
    "StudyDescription": "Wetherby protocol",
}
PLANTED = (UID_ROOT, *(word for value in PERSON.values() for word in value.split("^")))
FILE_WORD = "Ozymandias"
"""In the names of files and folders, which a patient's name may be as well."""
SLICES, SLICE_MS, SIDE = 24, 40.0, 64


def found(text: str, *words: str) -> set[str]:
    """Those of the words that the text holds, in any case."""
    return {word for word in words if word.lower() in text.lower()}


def logged(done: subprocess.CompletedProcess[str]) -> str:
    """What a command logged: its standard error without the one line that is its result."""
    return "\n".join(line for line in done.stderr.splitlines() if not line.startswith("groundglass: "))


def assert_private(done: subprocess.CompletedProcess[str]) -> None:
    """A command's log names no file and no person; its result names no person and no UID."""
    assert not found(logged(done), *PLANTED, FILE_WORD)
    assert not found(done.stderr + done.stdout, *PLANTED)


def write_study(folder: Path) -> Path:
    """A phantom of somebody, whose files bear a name, with a second series in it."""
    write_phantom(PhantomSettings(slices=SLICES, lesion=(4, 20), rows=SIDE, columns=SIDE), folder)
    for number, file in enumerate(sorted(folder.iterdir())):
        dataset = pydicom.dcmread(file)
        for keyword, value in PERSON.items():
            setattr(dataset, keyword, value)
        dataset.StudyInstanceUID = f"{UID_ROOT}.1"
        dataset.SeriesInstanceUID = OTHER_SERIES if number == 0 else SERIES
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID(f"{UID_ROOT}.3.{number}")
        dataset.save_as(folder / f"{FILE_WORD}_{number:03d}.dcm")
        file.unlink()
    return folder


@dataclass
class Site:
    """A balancer, one server behind it that logs all it can, a study, and what the commands have said so far."""

    front: Balancer
    server: EmbeddedTriton
    study: Path
    out: Path

    def analyze(self, *arguments: str | Path) -> list[str]:
        """The command's words: verbose, through the balancer."""
        address = ("--server", self.front.grpc_address, "--tls-ca", self.front.certificates.ca)
        return ["-v", "analyze", *map(str, (*arguments, *address))]

    def metrics(self) -> str:
        """The server's."""
        with urlopen(f"http://{self.server.metrics_address}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    def revive(self) -> None:
        """Kill the server and start it again where it was."""
        os.kill(self.server.pid, signal.SIGKILL)
        self.server.stop()
        self.server.start()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The deployment, for all tests of this module: the last of them reads what the others left in its logs."""
    folder = tmp_path_factory.mktemp("privacy")
    repository = waiting_repository(REPOSITORY, folder / "repository", SLICE_MS, SLICES)
    (settings,) = replica_settings(
        repository, 1, control="explicit", log_file=folder / "triton.log", arguments=("--log-verbose=3",)
    )
    study = write_study(folder / FILE_WORD)
    with EmbeddedTriton(settings) as server, balancer([settings], folder) as front:
        front.await_replicas(1)
        yield Site(front, server, study, folder / "out")


def test_a_report_names_the_series_and_nobody(site: Site) -> None:
    """A verbose analysis with everything written: the report holds series and files, and no output holds a person."""
    words = site.analyze(site.study, "--out", site.out, "--canary", "2:1")
    done = groundglass(*words)
    assert done.returncode == 0, done.stderr
    assert "canary version 2" in logged(done)
    assert_private(done)
    report = json.loads((site.out / "report.json").read_text())
    assert report["series"]["series_instance_uid"] == SERIES
    assert FILE_WORD in report["slices"][0]["file"]
    others = set(PLANTED) - {UID_ROOT}
    assert not found("".join(path.read_bytes().decode("latin-1") for path in site.out.iterdir()), *others)


@pytest.mark.parametrize("named", ["9", f"{UID_ROOT}.99"], ids=["number", "uid"])
def test_a_series_that_is_not_there_is_no_reason_to_list_uids(site: Site, named: str) -> None:
    """The error says which series there are by number, size and file, and repeats no UID."""
    done = groundglass(*site.analyze(site.study, "--series", named))
    assert done.returncode == 1
    assert_private(done)
    assert "series number 1 of 23 slices" in done.stderr


def test_files_that_contradict_each_other_are_named_and_nobody_else(site: Site, tmp_path: Path) -> None:
    """A refused study names the file at fault in its one line, and nothing of its header."""
    folder = write_study(tmp_path / FILE_WORD)
    odd = folder / f"{FILE_WORD}_005.dcm"
    dataset = pydicom.dcmread(odd)
    dataset.PixelSpacing = [9, 9]
    dataset.save_as(odd)
    done = groundglass(*site.analyze(folder))
    assert_one_clear_line(done, odd.name)
    assert_private(done)


def test_bad_files_that_are_skipped_are_counted_and_logged_nowhere(site: Site, tmp_path: Path) -> None:
    """Truncated, garbled and foreign files go to the report by name; the log is silent about them."""
    folder = write_study(tmp_path / FILE_WORD)
    truncated, garbled = (folder / f"{FILE_WORD}_{number:03d}.dcm" for number in (5, 6))
    truncated.write_bytes(truncated.read_bytes()[:2000])
    dataset = pydicom.dcmread(garbled)
    dataset.add(pydicom.DataElement("ImagePositionPatient", "LO", list(PERSON.values())[:3]))
    dataset.save_as(garbled)
    (folder / f"{FILE_WORD}.txt").write_text("\n".join(PERSON.values()))
    done = groundglass(*site.analyze(folder, "--skip-bad", "--json", tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert_private(done)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {item["file"] for item in report["refused"]} == {truncated.name, garbled.name}
    assert not found(json.dumps([report["refused"], report["ignored"]]), *PLANTED)


def test_a_server_killed_in_the_middle_is_logged_without_the_study(site: Site) -> None:
    """kill -9 in the middle of a study, whose client tries again until it has its verdict: its log names the server."""
    reached = 'nv_inference_count{model="preprocess",version="1"} '
    before = _value(site.metrics(), reached)
    command = [sys.executable, "-m", "groundglass", *site.analyze(site.study)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        try:
            wait_until(lambda: _value(site.metrics(), reached) > before, "the study at the server")
            site.revive()
            out, err = client.communicate(timeout=120)
        finally:
            client.kill()
    done = subprocess.CompletedProcess(command, client.returncode, out, err)
    assert done.returncode == 0, err
    assert "no answer, trying again" in logged(done)
    assert_private(done)


def test_a_key_that_names_a_patient_goes_no_further(site: Site) -> None:
    """A service that breaks the contract and calls its study by a UID and a name finds neither in the refusal."""
    key = f"{SERIES} {PERSON['PatientName']} {FILE_WORD}"
    with triton.InferenceServerClient(site.server.grpc_address) as client:
        for positives in (np.ones(4, np.bool_), np.zeros(4, np.bool_)):
            request = fold_request(positives, key)
            try:
                client.infer(request.model.name, _inputs(request))
            except InferenceServerException as error:
                said = str(error)
    assert "was positive and is now negative" in said
    assert not found(said, *PLANTED, FILE_WORD)


def test_status_names_nobody(site: Site) -> None:
    """`groundglass models status` tells of versions only."""
    asked = ("--server", site.server.grpc_address, "--repository", site.server.settings.repository)
    done = groundglass("-v", "models", "status", *asked)
    assert done.returncode == 0, done.stderr
    assert "live" in done.stdout
    assert not found(done.stdout + done.stderr, *PLANTED, FILE_WORD)


def test_logs_and_metrics_of_the_deployment_name_nobody(site: Site) -> None:
    """After all of that, neither server nor balancer has written down or counted a name, a number, a UID or a file."""
    told = {
        "server's log": (site.server.log_file.read_text(errors="replace"), "ct_scan"),
        "server's metrics": (site.metrics(), "groundglass_scans_total"),
        "balancer's log": (site.front.log_file.read_text(errors="replace"), "ModelInfer"),
        "balancer's metrics": (site.front.metrics(), "haproxy_backend"),
    }
    for what, (text, expected) in told.items():
        assert expected in text, what
        assert not found(text, *PLANTED, FILE_WORD), what


def _value(metrics: str, name: str) -> float:
    """A metric's value, 0 while it does not exist."""
    return next((float(line[len(name) :]) for line in metrics.splitlines() if line.startswith(name)), 0.0)
