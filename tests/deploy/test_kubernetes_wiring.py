"""The Kubernetes files against one another, the balancer's configuration and the code: names, ports, times, limits."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

import compose_file
from balancer import HOST, Balancer, Certificates, balancer
from debian_servers import environment, program
from groundglass_ensemble.embedded import ServeSettings
from groundglass_ensemble.keeper import SHARED_MEMORY
from waiting import wait_until

Document = dict[str, Any]

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
HAPROXY = (DEPLOY / "haproxy" / "haproxy.cfg").read_text()
DEFAULTS = dict(re.findall(r"presetenv (\w+) +(\S+)", HAPROXY))
COREDNS_CACHE_S = 30
"""For how long CoreDNS, as it is usually set up, hands out a name's old addresses."""


def documents(name: str) -> list[Document]:
    """The resources of a file."""
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


BASE = [document for name in ("triton", "lb", "model-control") for document in documents(f"base/{name}.yaml")]
DEPLOYMENTS = {document["metadata"]["name"]: document for document in BASE if document["kind"] == "Deployment"}
PODS = {name: deployment["spec"]["template"]["spec"] for name, deployment in DEPLOYMENTS.items()}
CONTAINERS = {name: pod["containers"][0] for name, pod in PODS.items()}
SERVICES = {document["metadata"]["name"]: document["spec"] for document in BASE if document["kind"] == "Service"}


COMPOSE = compose_file.services()
BY_NETWORK = {"LB_DNS", "TRITON_HOST", "GROUNDGLASS_WHO"}
"""Settings that say where one is, and who; both sides find them out in their own way."""


def settings(container: Document) -> dict[str, str]:
    """The environment of a container."""
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


def mounts(container: Document) -> dict[str, str]:
    """Where a container has its volumes."""
    return {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}


def ports(container: Document) -> dict[str, int]:
    """The ports of a container by name."""
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def seconds(directive: str) -> int:
    """A time of the balancer's configuration."""
    (amount, unit) = re.search(rf"^\s*{directive} (\d+)(s|m)$", HAPROXY, re.MULTILINE).groups()  # type: ignore[union-attr]
    return int(amount) * {"s": 1, "m": 60}[unit]


def last_number(command: list[str]) -> int:
    """The seconds that a command sleeps first."""
    return int(re.search(r"\bsleep (\d+)", " ".join(command)).group(1))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_selectors_match_their_pods(name: str) -> None:
    """Deployment, service and disruption budget of a name select just the pods of that deployment."""
    selectors = [DEPLOYMENTS[name]["spec"]["selector"]["matchLabels"]]
    selectors += [SERVICES[name]["selector"]] if name in SERVICES else []
    budgets = [d for d in BASE if d["kind"] == "PodDisruptionBudget" and d["metadata"]["name"] == name]
    selectors += [budget["spec"]["selector"]["matchLabels"] for budget in budgets]
    for selector in selectors:
        assert [
            other
            for other, deployment in DEPLOYMENTS.items()
            if selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
        ] == [name]


def test_ports_are_those_of_the_balancer() -> None:
    """The ports that Triton's pods name, the services, and the balancer's settings are the same everywhere."""
    assert ports(CONTAINERS["triton"]) == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert ports(CONTAINERS["lb"]) == {
        "grpc-tls": int(DEFAULTS["LB_BIND"].removeprefix(":")),
        "metrics": int(DEFAULTS["LB_METRICS_BIND"].removeprefix(":")),
    }
    assert ports(CONTAINERS["triton"])["grpc"] == int(DEFAULTS["TRITON_GRPC_PORT"])
    assert ports(CONTAINERS["triton"])["http"] == int(DEFAULTS["TRITON_HTTP_PORT"])
    for name, service in SERVICES.items():
        for port in service["ports"]:
            assert ports(CONTAINERS[name])[port["targetPort"]] == port["port"]


def test_only_the_balancer_has_an_address_of_its_own() -> None:
    """Triton's service is headless and lists ready pods only; the balancer's shows the gRPC port and nothing else."""
    assert SERVICES["triton"]["clusterIP"] == "None"
    assert SERVICES["triton"]["publishNotReadyAddresses"] is False
    assert [port["port"] for port in SERVICES["lb"]["ports"]] == [8443]


def test_every_setting_of_the_balancer_exists() -> None:
    """The balancer's environment sets only what its configuration reads, and its files lie where it looks for them."""
    container, pod = CONTAINERS["lb"], PODS["lb"]
    assert set(settings(container)) <= set(DEFAULTS)
    places = mounts(container)
    assert places["config"] == DEFAULTS["LB_FOLDER"]
    assert {str(Path(settings(container)[name]).parent) for name in ("LB_CERT", "LB_CLIENT_CA")} == {places["tls"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(places)


@pytest.mark.parametrize(("pod", "service"), [("triton", "triton"), ("lb", "lb"), ("model-control", "tools")])
def test_compose_runs_the_same(pod: str, service: str) -> None:
    """Images, users and settings are those of docker-compose.yml, but for what each network tells of itself."""
    container, composed = CONTAINERS[pod], COMPOSE[service]
    assert composed["image"].removesuffix(":0.1.0") == container["image"]
    given = {name: str(value) for name, value in composed["environment"].items()}
    theirs = {name: value for name, value in given.items() if name not in BY_NETWORK}
    assert {name: value for name, value in settings(container).items() if name not in BY_NETWORK} == theirs
    if service != "tools":  # there the user is whoever works on the host
        identity = PODS[pod]["securityContext"]
        assert composed["user"] == f"{identity['runAsUser']}:{identity['runAsGroup']}"


def test_compose_starts_the_same_server() -> None:
    """Command, flags, repository and the whole probe are those of docker-compose.yml; so is what makes the plan."""
    container, composed = CONTAINERS["triton"], COMPOSE["triton"]
    assert container["command"] == composed["entrypoint"]
    assert container["args"] == composed["command"]
    assert f"{mounts(container)['models']}:ro" == composed["volumes"][0].partition(":")[2]
    probe = container["startupProbe"]["exec"]["command"]
    assert probe[:3] == composed["healthcheck"]["test"][1:4]
    (overlay,) = documents("overlays/gpu/triton.yaml")
    (plan,) = overlay["spec"]["template"]["spec"]["initContainers"]
    assert [*plan["command"], *plan["args"]][2:6] == [
        *COMPOSE["export"]["entrypoint"],
        *COMPOSE["export"]["command"][:2],
    ]
    target = plan["args"][-1].replace("$(UNET_VERSION)", settings(plan)["UNET_VERSION"])
    assert target == COMPOSE["export"]["command"][-1]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_pods_are_confined(name: str) -> None:
    """No root, no writable image, no capability, the default system calls, no token; memory and CPU have limits."""
    pod, container = PODS[name], CONTAINERS[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for kind in ("requests", "limits"):
        assert set(container["resources"][kind]) >= {"cpu", "memory"}


def test_only_who_must_writes_to_the_repository() -> None:
    """The servers mount the model repository read-only, and the claim lets several nodes mount it."""
    models = {
        name: mount
        for name, container in CONTAINERS.items()
        for mount in container["volumeMounts"]
        if mount["name"] == "models"
    }
    assert {name: mount.get("readOnly", False) for name, mount in models.items()} == {
        "triton": True,
        "model-control": False,
    }
    (claim,) = documents("models/claim.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert settings(CONTAINERS["model-control"])["GROUNDGLASS_REPOSITORY"] == models["model-control"]["mountPath"]


def test_no_secret_stands_in_the_environment() -> None:
    """Keys and certificates come as files of Secrets; the environment holds their paths only."""
    for container in CONTAINERS.values():
        for name, value in settings(container).items():
            if re.search("KEY|CERT|CA$|SECRET|PASSWORD|TOKEN", name):
                assert value.startswith("/run/secrets/"), name


def test_the_python_stage_has_shared_memory() -> None:
    """Shared memory is memory with a limit, far above the runtime's 64 MB and far below the container's."""
    (volume,) = [volume for volume in PODS["triton"]["volumes"] if volume["name"] == "shm"]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert {"name": "shm", "mountPath": str(SHARED_MEMORY)} in CONTAINERS["triton"]["volumeMounts"]
    assert int(CONTAINERS["triton"]["resources"]["limits"]["memory"].removesuffix("Gi")) > 4


def test_a_replica_outlives_what_is_sent_to_it() -> None:
    """A leaving replica serves until DNS and the balancer have forgotten it, and then answers what it still has."""
    serving_s = last_number(CONTAINERS["triton"]["lifecycle"]["preStop"]["exec"]["command"])
    (flag,) = [flag for flag in CONTAINERS["triton"]["args"] if flag.startswith("--exit-timeout-secs=")]
    assert serving_s >= COREDNS_CACHE_S + seconds("hold obsolete") + seconds("timeout resolve")
    assert PODS["triton"]["terminationGracePeriodSeconds"] >= serving_s + int(flag.partition("=")[2]) + 10


def test_a_balancer_outlives_its_requests() -> None:
    """A leaving balancer is asked to end in order, and has as long for it as its configuration allows."""
    command = CONTAINERS["lb"]["lifecycle"]["preStop"]["exec"]["command"]
    assert "kill -USR1 1" in command[-1]
    assert PODS["lb"]["terminationGracePeriodSeconds"] >= last_number(command) + seconds("hard-stop-after")


@pytest.mark.parametrize("name", ["triton", "lb"])
def test_nothing_is_taken_away_before_its_successor_is_there(name: str) -> None:
    """Rollouts add first; disruptions and nodes take at most one of at least two; replicas spread over nodes."""
    deployment = DEPLOYMENTS[name]["spec"]
    (budget,) = [d["spec"] for d in BASE if d["kind"] == "PodDisruptionBudget" and d["metadata"]["name"] == name]
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert deployment["replicas"] - budget["maxUnavailable"] >= 1
    (spread,) = PODS[name]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == deployment["selector"]["matchLabels"]


def test_the_autoscaler_stays_within_the_balancer() -> None:
    """It scales by the adapter's metric, from what disruptions leave one of, to what the balancer has places for."""
    (autoscaler,) = documents("components/autoscaling/autoscaler.yaml")
    specification = autoscaler["spec"]
    target = specification["scaleTargetRef"]
    assert (target["kind"], target["apiVersion"]) == ("Deployment", DEPLOYMENTS[target["name"]]["apiVersion"])
    assert 2 <= specification["minReplicas"] < specification["maxReplicas"]
    assert specification["maxReplicas"] + 1 <= int(settings(CONTAINERS["lb"])["LB_SLOTS"])
    (metric,) = specification["metrics"]
    assert metric["pods"]["metric"]["name"] == adapter_rule()["name"]["as"]


def adapter_rule() -> Document:
    """Prometheus Adapter's rule."""
    (adapter,) = documents("components/autoscaling/prometheus-adapter.yaml")
    (rule,) = adapter["rules"]["custom"]
    return dict(rule)


def test_the_adapter_tells_how_long_requests_wait(tmp_path: Path) -> None:
    """Of a busy pod it makes seconds per request, of an idle one 0, and of other models and jobs nothing."""
    query = (
        adapter_rule()["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'namespace="ours"')
    )
    series = {
        '{job="triton",namespace="ours",pod="busy",model="unet",version="1"}': ("0+16000000x10", "0+32x10"),
        '{job="triton",namespace="ours",pod="idle",model="unet",version="1"}': ("7x10", "3x10"),
        '{job="triton",namespace="ours",pod="busy",model="preprocess",version="1"}': ("0+9000000x10", "0+20x10"),
        '{job="other",namespace="ours",pod="foreign",model="unet",version="1"}': ("0+16000000x10", "0+32x10"),
    }
    names = ("nv_inference_queue_duration_us", "nv_inference_request_success")
    expected = [{"labels": '{pod="busy"}', "value": 0.5}, {"labels": '{pod="idle"}', "value": 0}]
    case = {
        "interval": "30s",
        "input_series": [
            {"series": name + labels, "values": values}
            for labels, both in series.items()
            for name, values in zip(names, both, strict=True)
        ],
        "promql_expr_test": [{"expr": query, "eval_time": "5m", "exp_samples": expected}],
    }
    file = tmp_path / "adapter.yml"
    file.write_text(json.dumps({"tests": [case]}))
    done = subprocess.run(
        [program("promtool"), "test", "rules", str(file)], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("address", ["10.96.0.10", "fd00::a"])
def test_the_balancer_finds_its_names(address: str, tmp_path: Path) -> None:
    """The container's command takes DNS server and full name from what the pod is told, and HAProxy accepts both."""
    certificates = Certificates.issue(tmp_path)
    told = tmp_path / "resolv.conf"
    told.write_text(f"search ours.svc.k8s.test svc.k8s.test k8s.test\nnameserver {address}\nnameserver 192.0.2.1\n")
    container = CONTAINERS["lb"]
    (script,) = container["args"]
    script = script.replace("/etc/resolv.conf", str(told)).replace(DEFAULTS["LB_FOLDER"], str(DEPLOY / "haproxy"))
    start = f"exec haproxy -db -f {DEPLOY}/haproxy/haproxy.cfg"
    assert start in script
    script = script.replace(
        start, f'echo "$LB_DNS $TRITON_HOST"; exec {program("haproxy")} -c -f {DEPLOY}/haproxy/haproxy.cfg'
    )
    variables = {**environment(), **settings(container)}
    variables |= {"LB_CERT": str(certificates.server), "LB_CLIENT_CA": str(certificates.ca)}
    variables["LB_FOLDER"] = str(DEPLOY / "haproxy")
    done = subprocess.run([*container["command"], script], capture_output=True, text=True, env=variables, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{address}:53 triton.ours.svc.k8s.test"


def answers(running: Balancer) -> bool:
    """Whether the balancer has started."""
    with contextlib.suppress(OSError):
        return bool(running.metrics())
    return False


def test_a_leaving_balancer_ends_in_order(tmp_path: Path) -> None:
    """What Kubernetes runs before it ends a balancer's pod stops HAProxy, and returns once that is gone."""
    (shell, option, script) = CONTAINERS["lb"]["lifecycle"]["preStop"]["exec"]["command"]
    with balancer([ServeSettings(tmp_path, host=HOST, grpc_port=1, http_port=1)], tmp_path) as running:
        wait_until(lambda: answers(running), "the balancer")
        # Without the wait for other nodes, and with the process that is the first one in a container.
        script = re.sub(r"(-USR1|-0) 1\b", rf"\1 {running.process.pid}", script.replace("sleep 15", "true"))
        with ExitStack() as cleaning, subprocess.Popen([shell, option, script], stderr=subprocess.DEVNULL) as leaving:
            cleaning.callback(leaving.kill)
            assert running.process.wait(10) == 0
            assert leaving.wait(10) == 0
