"""The benchmark as it runs: its refusals, a quick run against a real server, and failures that stay alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from command import assert_one_clear_line, groundglass
from groundglass import contract
from groundglass.errors import GroundglassError, MissingExtra, SettingError
from groundglass_bench import kinds, running
from groundglass_bench.networks import CONFIG_NAME, near_free_repository, near_free_unet, waiting_repository
from groundglass_bench.result import Measured, read_results
from groundglass_bench.running import Plan, check_before, plan_run, run, without_measured
from groundglass_bench.scenario import choose_scenarios
from groundglass_bench.serving import Surroundings
from groundglass_ensemble.embedded import EmbeddedTriton
from groundglass_ensemble.repository import find_problems

REPOSITORY = Path(__file__).parents[2] / "model_repository"
HOST = {"date": "2026-01-02", "commit": "0", "versions": {}}


def surroundings(scratch: Path, server: str | None = None) -> Surroundings:
    """As the command line makes them, without torch."""

    def no_torch() -> Any:
        raise MissingExtra("torch", "export")

    return Surroundings(
        repository=REPOSITORY,
        config_name=CONFIG_NAME,
        server=server,
        study=None,
        scratch=scratch,
        open_torch=no_torch,
        open_plan=lambda path: {},
        tell=lambda line: None,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scenario", "roof"), "--scenario roof: unknown"),
        (("--scenario", "hidden-decode", "--study", "no/such/study"), "--study no/such/study: no such file"),
        (("--scenario", "hidden-decode", "--server", "127.0.0.1:9"), "no server answers at 127.0.0.1:9"),
        (("--scenario", "ceiling", "--repository", "no/such"), "no/such"),
    ],
    ids=["unknown", "study", "dead server", "repository"],
)
def test_what_cant_be_measured_is_one_clear_line(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    """Exit code 1, one line, and no folder of results."""
    assert_one_clear_line(groundglass("bench", "--quick", "--out", tmp_path / "out", *options), words)
    assert not (tmp_path / "out").exists()


def test_scenarios_are_listed() -> None:
    """Every scenario with its sentence, without booting anything."""
    done = groundglass("bench", "--list")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == len(choose_scenarios((), quick=False))
    assert "soak" in done.stdout


def test_a_users_server_gets_what_makes_sense() -> None:
    """Networks of our own and more load than a server can take are left out, with the reason."""
    scenarios = choose_scenarios((), quick=True)
    plan = plan_run(scenarios, "triton.example:8001", asked=False)
    assert {scenario.kind for scenario in plan.scenarios} == {"hidden_decode", "scaling_slices", "scaling_users"}
    assert "run it where the server runs" in plan.left_out["efficiency-300"]
    assert "name it with --scenario" in plan.left_out["open-loop"]
    assert "efficiency-300" not in plan_run(scenarios, "localhost:8001", asked=False).left_out
    assert plan_run(choose_scenarios(["open-loop"], quick=True), "h:1", asked=True).scenarios
    with pytest.raises(SettingError, match="--scenario ceiling needs a network of its own"):
        plan_run(choose_scenarios(["ceiling"], quick=True), "h:1", asked=True)


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ("127.0.0.1:9", "no server answers at 127.0.0.1:9"),
        ("127.0.0.1:9,127.0.0.1:10", "one server at a time"),
        ("nowhere", "expected HOST:PORT"),
    ],
)
def test_a_server_that_cant_be_measured_is_found_before_anything_runs(tmp_path: Path, server: str, words: str) -> None:
    """The check says which server did not answer, or is none."""
    plan = plan_run(choose_scenarios(["hidden-decode"], quick=True), server, asked=True)
    with pytest.raises(GroundglassError) as refusal:
        check_before(plan, surroundings(tmp_path, server), tmp_path / "out")
    assert words in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cant_be_made_is_found_before_anything_runs(tmp_path: Path) -> None:
    """A file in the place of the results is named."""
    (tmp_path / "out").write_text("")
    plan = plan_run(choose_scenarios(["ceiling"], quick=True), None, asked=True)
    with pytest.raises(SettingError, match="no folder can be made there"):
        check_before(plan, surroundings(tmp_path), tmp_path / "out")


def test_one_failing_scenario_does_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is its result; the next one runs; a resumed run does only what failed."""

    def failing(load: object, around: Surroundings) -> Measured:
        raise RuntimeError("first line\nsecond line")

    def empty(load: object, around: Surroundings) -> Measured:
        return Measured(())

    names = {"ceiling": failing, "soak": empty}
    stubs = {name: kinds.Kind(measure, False, "own") for name, measure in names.items()}
    monkeypatch.setattr(running, "KINDS", stubs)
    plan = Plan(tuple(choose_scenarios(["ceiling", "soak"], quick=True)), {})
    results = run(plan, surroundings(tmp_path), tmp_path, HOST)
    assert [result.error for result in results] == ["RuntimeError: first line", None]
    assert read_results(tmp_path) == results
    assert [scenario.name for scenario in without_measured(plan, tmp_path).scenarios] == ["ceiling"]


def test_the_near_free_network_keeps_the_contract() -> None:
    """Its mask, its pixel count and its verdict agree; a slice of air is negative."""
    session = onnxruntime.InferenceSession(near_free_unet().SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.zeros((2, *contract.IMAGE.dims), dtype=np.float32)
    images[1, :, 200:300, 64:128] = 1.0
    mask, pixels, positive = session.run([spec.name for spec in contract.UNET.outputs], {contract.IMAGE.name: images})
    assert np.unpackbits(mask, axis=2).sum(axis=(1, 2)).tolist() == pixels[:, 0].tolist() == [0, 64 * 64 * 8]
    assert positive[:, 0].tolist() == [False, True]


def test_repositories_differ_in_the_network_alone(tmp_path: Path) -> None:
    """Both copies keep the tensor contract; the real weights are not copied."""
    free = near_free_repository(REPOSITORY, tmp_path / "free")
    waiting = waiting_repository(REPOSITORY, tmp_path / "waiting", slice_ms=5.0, rows=8, instances=2)
    assert find_problems(free, CONFIG_NAME) == find_problems(waiting, CONFIG_NAME) == []
    assert onnx.load(free / "unet" / "1" / "model.onnx").graph.name == "near_free"
    assert {file.name for file in (waiting / "unet" / "1").iterdir()} == {"model.py"}
    large = near_free_repository(REPOSITORY, tmp_path / "large", max_batch=256)
    problems = find_problems(large, CONFIG_NAME)
    assert len(problems) == 3
    assert all("max_batch_size is 256" in problem for problem in problems)


@pytest.mark.triton
@pytest.mark.slow
def test_a_quick_run_measures_the_ceiling(tmp_path: Path) -> None:
    """One command boots a server, measures, and leaves result, report and plot; nothing is judged."""
    out = tmp_path / "out"
    done = groundglass("bench", "--quick", "--scenario", "ceiling", "--repository", REPOSITORY, "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"report: {out / 'report.md'}" in done.stdout
    content = json.loads((out / "ceiling.json").read_text())
    figures = {figure["name"]: figure["median"] for figure in content["measured"]["figures"]}
    assert figures.keys() == {"grpc", "grpc_masks", "shared_memory", "shared_memory_masks"}
    assert min(figures.values()) > 0
    (stages,) = content["measured"]["tables"]
    assert {row[0]: row[1] for row in stages["rows"]}["unet"] == 4 * 64
    assert "not judged (quick)" in (out / "report.md").read_text()
    assert (out / "plots" / "ceiling-1.png").is_file()


@pytest.mark.triton
@pytest.mark.slow
def test_a_users_server_is_measured(probe_server: EmbeddedTriton, tmp_path: Path) -> None:
    """--server measures the server that it names, and leaves it running."""
    out = tmp_path / "out"
    options = ("--server", probe_server.grpc_address, "--scenario", "hidden-decode", "--out", out)
    done = groundglass("bench", "--quick", *options)
    assert done.returncode == 0, done.stderr
    (found,) = read_results(out)
    assert found.server == probe_server.grpc_address
    assert found.figure("disk_over_memory") is not None
    assert probe_server.running
