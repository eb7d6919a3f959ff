"""docker-compose.yml against its specification, its settings, and what of this project it names."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from compose_file import (
    COMPOSE_FILE,
    IMAGE_FOLDER,
    PROJECT,
    SETTINGS_FILE,
    command_of,
    compose,
    mounts_of,
    on_host,
    services,
    settings,
    variables,
)
from debian_servers import environment, program
from groundglass import contract

OURS = ("groundglass-triton", "groundglass-export", "groundglass-client")
SERVERS = ("triton", "triton-cpu")


def every_service(test: Any) -> Any:
    """Run a test for each service."""
    return pytest.mark.parametrize("name", sorted(services()))(test)


def seconds(text: str) -> float:
    """A duration as compose writes it."""
    return float(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


def stages() -> set[str]:
    """Stages of the Dockerfile."""
    return set(re.findall(r"^FROM \S+ AS (\S+)$", (PROJECT / "deploy" / "Dockerfile").read_text(), re.MULTILINE))


def test_it_follows_the_specification(tmp_path: Path) -> None:
    """The file is valid as it is written, and with the settings in place."""
    filled = tmp_path / "filled.json"
    filled.write_text(json.dumps(compose()))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(COMPOSE_FILE), str(filled)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_settings_and_variables_are_the_same() -> None:
    """Every variable is a setting and every setting a variable; no other way to write one is used."""
    assert variables() == set(settings()) - {"COMPOSE_PROFILES"}  # that one is docker compose's own
    content = COMPOSE_FILE.read_text()
    assert content.count("$") == content.count(":?copy .env.example to .env}")


def test_every_setting_is_explained() -> None:
    """A comment stands right before each setting."""
    lines = itertools.pairwise(SETTINGS_FILE.read_text().splitlines())
    assert [line for before, line in lines if line[:1].isupper() and not before.startswith("#")] == []


def test_each_profile_serves_under_the_same_name() -> None:
    """Whatever profile serves, the balancer and Prometheus find its servers as ``triton``."""
    chosen = services()
    assert settings()["COMPOSE_PROFILES"] == "gpu"
    assert chosen["triton"]["profiles"] == ["gpu"]
    assert chosen["triton-cpu"]["profiles"] == ["cpu"]
    assert chosen["triton-cpu"]["networks"]["serving"]["aliases"] == ["triton"]
    assert [name for name, service in chosen.items() if "profiles" not in service] == ["lb", "prometheus", "grafana"]


def test_the_two_servers_differ_in_the_gpu_alone() -> None:
    """The CPU server is the GPU server with the CPU's model configuration."""
    gpu, cpu = (services()[name] for name in SERVERS)
    assert command_of(cpu) == [command_of(gpu)[0], "--model-config-name=cpu", *command_of(gpu)[1:]]
    apart = {"profiles", "deploy", "depends_on", "entrypoint", "networks"}
    assert {key: gpu[key] for key in gpu.keys() - apart} == {key: cpu[key] for key in cpu.keys() - apart}
    for model in (contract.PREPROCESS, contract.UNET):
        assert (PROJECT / "model_repository" / model.name / "configs" / "cpu.pbtxt").is_file()


@every_service
def test_nothing_has_more_rights_than_it_needs(name: str) -> None:
    """No root, no capability, no new privileges, nothing to write to but /tmp and mounts, and logs that end."""
    service = services()[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert int(service["user"].split(":")[0]) > 0
    assert not service.keys() & {"privileged", "cap_add", "devices", "pid", "userns_mode"}
    assert service.get("network_mode", "none") == "none"
    assert service.get("ipc", "private") in ("private", "shareable")
    assert not any("docker.sock" in source or source == "/" for source in mounts_of(service).values())
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}


@every_service
def test_images_have_a_version(name: str) -> None:
    """Every image is pinned; ours have the project's version, and are built by a stage of the Dockerfile."""
    service = services()[name]
    image, _, tag = service["image"].rpartition(":")
    assert re.fullmatch(r"v?\d+(\.\d+)+(-[a-z]+)?", tag)
    assert ("build" in service) == (image in OURS)
    if image in OURS:
        version = re.search(r'^version = "(.+)"$', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
        assert version is not None
        assert tag == version[1]
        assert service["build"]["target"] == image.removeprefix("groundglass-")
        assert service["build"]["target"] in stages()
        assert (PROJECT / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize(("name", "option"), [("lb", "-v"), ("prometheus", "--version")])
def test_what_runs_is_what_is_tested(name: str, option: str) -> None:
    """Balancer and Prometheus have the version of the programs that the tests run."""
    said = subprocess.run([program({"lb": "haproxy"}.get(name, name)), option], capture_output=True, text=True,
                          env=environment())  # fmt: skip
    version = services()[name]["image"].rpartition(":")[2].removeprefix("v").removesuffix("-alpine")
    assert re.search(rf"version {re.escape(version)}\b", said.stdout + said.stderr)


def test_only_the_balancer_is_reached_from_outside() -> None:
    """One port is open to other machines; Prometheus and Grafana listen on loopback, and servers publish nothing."""
    published = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert published.keys() == {"lb", "prometheus", "grafana"}
    assert published["lb"] == [f"{settings()['LB_PORT']}:8443"]
    assert all(port.startswith("127.0.0.1:") for name in ("prometheus", "grafana") for port in published[name])
    for name in SERVERS:
        assert [compose()["networks"][network].get("internal") for network in services()[name]["networks"]] == [True]


def test_prometheus_sees_the_balancer_once() -> None:
    """Two services that share two networks have two addresses, and would be counted twice."""
    watched, watching = (set(services()[name]["networks"]) for name in ("lb", "prometheus"))
    assert len(watched & watching) == 1


def test_the_balancer_finds_what_it_is_given() -> None:
    """Every setting of ``lb`` is one that haproxy.cfg has; its ports and the servers' are those that it means."""
    balancer = services()["lb"]
    known = dict(re.findall(r"^ *presetenv (\w+) +(\S+)$", (PROJECT / "deploy/haproxy/haproxy.cfg").read_text(), re.M))
    assert balancer["environment"].keys() <= known.keys()
    assert known["LB_FOLDER"] in mounts_of(balancer)
    assert f":{balancer['ports'][0].rpartition(':')[2]}" == known["LB_BIND"]
    assert f"http://127.0.0.1{known['LB_METRICS_BIND']}/healthz" in balancer["healthcheck"]["test"]
    for variable in ("LB_CERT", "LB_CLIENT_CA"):
        assert balancer["environment"][variable].removeprefix("/run/secrets/") in balancer["secrets"]


def test_the_start_waits_for_what_it_needs() -> None:
    """A plan, then servers that infer, then the balancer; servers are told to end well before they are killed."""
    chosen = services()
    assert chosen["triton"]["depends_on"] == {"export": {"condition": "service_completed_successfully"}}
    assert chosen["export"]["restart"] == "no"
    assert chosen["lb"]["depends_on"] == {name: {"condition": "service_healthy", "required": False} for name in SERVERS}
    for name in SERVERS:
        (exit_timeout_s,) = re.findall(r"--exit-timeout-secs=(\d+)", " ".join(command_of(chosen[name])))
        assert seconds(chosen[name]["stop_grace_period"]) > int(exit_timeout_s)
        health = chosen[name]["healthcheck"]
        questions = 3  # the probe's, each of which may take its time
        assert seconds(health["timeout"]) > questions * float(health["test"][health["test"].index("--timeout-s") + 1])


@every_service
def test_what_it_names_exists(name: str) -> None:
    """Files of ours that a service mounts, runs or reads are there, and our programs can be run."""
    service = services()[name]
    for target, source in mounts_of(service).items():
        made_by_people = source in ("./build", "./out")
        assert made_by_people or (PROJECT / source).exists(), f"{source} at {target}"
    words = [*command_of(service), *service["healthcheck"]["test"]] if "healthcheck" in service else command_of(service)
    paths = [path for word in words for path in re.findall(rf"(?:^|=)({IMAGE_FOLDER}\S+|/etc/\S+)", word)]
    for path in paths:
        assert on_host(service, path).is_file(), path
        assert not path.endswith(".sh") or os.access(on_host(service, path), os.X_OK), path
    for module in (word for word in words if word.startswith("groundglass_")):
        assert importlib.util.find_spec(module) is not None, module


def test_servers_read_the_repository_and_others_write_it() -> None:
    """The repository is mounted where serve.sh looks for it, read-only; plan builder and tools write to it."""
    chosen = services()
    for name, suffix in (("triton", ":ro"), ("triton-cpu", ":ro"), ("export", ""), ("tools", "")):
        assert f"{settings()['MODEL_REPOSITORY']}:/models{suffix}" in chosen[name]["volumes"]
    assert "${MODEL_REPOSITORY:-/models}" in (PROJECT / "deploy" / "serve.sh").read_text()
    for model in contract.MODELS:
        assert (PROJECT / settings()["MODEL_REPOSITORY"] / model.name / "config.pbtxt").is_file()
    config = (PROJECT / "model_repository" / contract.UNET.name / "config.pbtxt").read_text()
    plan = Path(chosen["export"]["command"][-1])
    assert (plan.parts[-3], plan.parts[-2]) == (contract.UNET.name, settings()["UNET_VERSION"])
    assert f'default_model_filename: "{plan.name}"' in config


def test_scripts_know_the_settings_that_they_get() -> None:
    """What servers and tools are given by the environment is what their scripts, or the command line, look at."""
    known = "".join((PROJECT / "deploy" / name).read_text() for name in ("serve.sh", "models.sh"))
    known += "".join(file.read_text() for file in (PROJECT / "core" / "groundglass" / "cli").glob("*.py"))
    for name in (*SERVERS, "tools"):
        for variable in services()[name]["environment"]:
            assert variable in known, variable


def test_prometheus_takes_its_options() -> None:
    """The real Prometheus knows every option, and the folder that it keeps its data in is the volume's."""
    watching = services()["prometheus"]
    said = subprocess.run([program("prometheus"), "--help"], capture_output=True, text=True, env=environment())
    for option in watching["command"]:
        assert f"{option.split('=')[0]}=" in said.stdout + said.stderr
    assert "prometheus:/prometheus" in watching["volumes"]
    assert "--storage.tsdb.path=/prometheus" in watching["command"]
    rules = yaml.safe_load((PROJECT / "deploy" / "prometheus" / "prometheus.yml").read_text())["rule_files"]
    for pattern in rules:
        folder = on_host(watching, str(Path(pattern).parent))
        assert list(folder.glob(Path(pattern).name)), pattern


def test_grafana_finds_dashboards_and_source() -> None:
    """The dashboards are where their provider looks, and the data source is Prometheus' service and port."""
    shown = services()["grafana"]
    provisioning = on_host(shown, "/etc/grafana/provisioning")
    (provider,) = [
        provider
        for file in (provisioning / "dashboards").glob("*.yml")
        for provider in yaml.safe_load(file.read_text())["providers"]
    ]
    assert list(on_host(shown, provider["options"]["path"]).glob("*.json"))
    (source,) = [
        source
        for file in (provisioning / "datasources").glob("*.yml")
        for source in yaml.safe_load(file.read_text())["datasources"]
    ]
    assert source["url"] == f"http://prometheus:{services()['prometheus']['ports'][0].rpartition(':')[2]}"
    assert set(services()["prometheus"]["networks"]) & set(shown["networks"])


def test_locust_takes_its_options(tmp_path: Path) -> None:
    """locust, with our file, knows every option that it is started with."""
    words = command_of(services()["locust"])
    file = on_host(services()["locust"], words[1].split("=")[1])
    command = [sys.executable, "-m", "locust", f"--locustfile={file}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    for option in words[1:]:
        assert option.split("=")[0] in done.stdout, done.stderr


def test_the_guide_names_what_is_there() -> None:
    """Services, settings and secrets in deploy/README.md are those of the deployment; its scripts exist."""
    guide = (PROJECT / "deploy" / "README.md").read_text()
    assert set(re.findall(r"docker compose run --rm ([a-z]+)", guide)) <= services().keys()
    assert {name for row in re.findall(r"^\| (`.+?) \|", guide, re.M) for name in re.findall(r"`([^`]+)`", row)} == set(
        services()
    )
    assert set(re.findall(r"`([A-Z]+_[A-Z_]+)(?:=\w+)?`", guide)) <= settings().keys()
    assert {Path(file).name for file in re.findall(r"deploy/secrets/[\w.-]+", guide)} <= compose()["secrets"].keys()
    for script in set(re.findall(r"deploy/\w+\.sh", guide)):
        assert os.access(PROJECT / script, os.X_OK), script
