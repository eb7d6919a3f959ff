"""The Kubernetes files: whether an API server would take them, one by one and as kustomize puts them together."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

Document = dict[str, Any]

PROJECT = Path(__file__).parents[2]
KUBERNETES = PROJECT / "deploy" / "kubernetes"
KUBECTL = shutil.which("kubectl")
VERSION = kubernetes_validate.latest_version()
OVERLAYS = ("overlays/gpu", "overlays/cpu", "kserve")
COMPONENTS = ("monitoring", "autoscaling")
FOREIGN = ("serving.kserve.io", "monitoring.coreos.com")
POD_MONITOR_ENDPOINT = {"port": str, "path": str, "interval": str, "scrapeTimeout": str}
"""Fields of the operator's custom resource that ours may use (its definition of version 0.87)."""


def documents(text: str) -> list[Document]:
    """The resources of a YAML stream."""
    return [document for document in yaml.safe_load_all(text) if document]


def resource_files() -> list[Path]:
    """Whole resources, as the kustomizations name them; their patches are parts only."""
    found = []
    for kustomization in KUBERNETES.rglob("kustomization.yaml"):
        entries = yaml.safe_load(kustomization.read_text()).get("resources", [])
        found += [kustomization.parent / entry for entry in entries if entry.endswith(".yaml")]
    return found


def is_foreign(document: Document) -> bool:
    """Whether a document's kind is none of Kubernetes' own."""
    return document["apiVersion"].partition("/")[0] in FOREIGN


def check(documents_found: list[Document]) -> None:
    """Fail unless Kubernetes' own schemas accept the documents, with no field that they don't know."""
    for document in documents_found:
        if not is_foreign(document):
            kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Document]]:
    """What ``kubectl apply -k`` would send, by overlay, with every component in the GPU one; secrets are made up."""
    if KUBECTL is None:
        pytest.skip("no kubectl on PATH: the files are checked one by one only")
    root = tmp_path_factory.mktemp("kubernetes") / "deploy"
    shutil.copytree(PROJECT / "deploy", root)
    kubernetes = root / "kubernetes"
    for secret in ("secrets/control/control.key", "secrets/tls/lb.pem", "secrets/tls/client-ca.pem"):
        (kubernetes / secret).write_text("made up\n")
    gpu = kubernetes / "overlays" / "gpu" / "kustomization.yaml"
    gpu.write_text(gpu.read_text() + f"components: {[f'../../components/{name}' for name in COMPONENTS]}\n")
    made = {overlay: render(kubernetes / overlay) for overlay in OVERLAYS}
    assert [done.stderr for done in made.values()] == [""] * len(OVERLAYS)
    return {overlay: documents(done.stdout) for overlay, done in made.items()}


def render(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run kustomize, which kubectl contains."""
    command = [KUBECTL or "kubectl", "kustomize", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def named(found: list[Document], kind: str, name: str) -> Document:
    """The one resource of a kind and name; generated names end in a digest."""
    (match,) = [
        document
        for document in found
        if document["kind"] == kind and re.fullmatch(rf"{name}(-[a-z0-9]{{10}})?", document["metadata"]["name"])
    ]
    return match


def pod_of(deployment: Document) -> Document:
    """The pod's specification in a Deployment."""
    specification: Document = deployment["spec"]["template"]["spec"]
    return specification


@pytest.mark.parametrize("file", resource_files(), ids=lambda file: str(file.relative_to(KUBERNETES)))
def test_every_file_is_valid(file: Path) -> None:
    """Each resource, as committed, is valid under the newest published schemas, which refuse unknown fields."""
    found = documents(file.read_text())
    assert found
    check(found)


def test_the_schemas_refuse_what_is_wrong() -> None:
    """A misspelt field and a wrong type are noticed, so the checks above can fail."""
    (deployment, *_) = documents((KUBERNETES / "base" / "triton.yaml").read_text())
    for wrong in ({"replica": 2}, {"replicas": "two"}):
        with pytest.raises(kubernetes_validate.ValidationError):
            check([{**deployment, "spec": {**deployment["spec"], **wrong}}])


def test_what_kustomize_makes_is_valid(rendered: dict[str, list[Document]]) -> None:
    """Each overlay, components included, builds into valid resources that all differ in kind or name."""
    for found in rendered.values():
        check(found)
        names = [(document["kind"], document["metadata"]["name"]) for document in found]
        assert len(set(names)) == len(names)
        assert all("namespace" not in document["metadata"] for document in found)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_applied_without_the_secrets(overlay: str) -> None:
    """A checkout holds no secret, and what needs one is refused by the name of its file."""
    if KUBECTL is None:
        pytest.skip("no kubectl on PATH")
    if any((KUBERNETES / "secrets").rglob("*.key")):
        pytest.skip("this checkout has been given secrets")
    done = render(KUBERNETES / overlay)
    assert done.returncode != 0
    assert re.search(r"control\.key|lb\.pem", done.stderr)


def test_gpu_and_cpu_differ_where_they_must(rendered: dict[str, list[Document]]) -> None:
    """The GPU deployment asks for one GPU and makes its plan; the CPU one asks for none and serves the ONNX graphs."""
    gpu, cpu = (pod_of(named(rendered[f"overlays/{kind}"], "Deployment", "triton")) for kind in ("gpu", "cpu"))
    (gpu_server,), (cpu_server,) = gpu["containers"], cpu["containers"]
    assert gpu_server["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert [container["name"] for container in gpu["initContainers"]] == ["plan"]
    assert cpu_server["args"] == [*gpu_server["args"], "--model-config-name=cpu"]
    assert "nvidia.com/gpu" not in json.dumps(cpu)
    assert "initContainers" not in cpu


def test_generated_names_are_used(rendered: dict[str, list[Document]]) -> None:
    """Pods mount the generated ConfigMaps and Secrets by the names that carry their digest, so a change rolls them."""
    for found in rendered.values():
        generated = {d["metadata"]["name"] for d in found if d["kind"] in ("ConfigMap", "Secret")}
        text = json.dumps([d for d in found if d["kind"] not in ("ConfigMap", "Secret")])
        used = set(re.findall(r'"(?:secretName|name)": "((?:lb-config|lb-tls|control-key)-[a-z0-9]{10})"', text))
        assert used == generated


def test_the_autoscaler_alone_counts_replicas(rendered: dict[str, list[Document]]) -> None:
    """With the autoscaler the Deployment says nothing of replicas, which would undo its work at every apply."""
    counts = [
        named(rendered[f"overlays/{kind}"], "Deployment", "triton")["spec"].get("replicas") for kind in ("gpu", "cpu")
    ]
    assert counts == [None, 2]


def test_the_balancer_gets_the_files_of_compose(rendered: dict[str, list[Document]]) -> None:
    """The ConfigMap holds the very files of deploy/haproxy, all of them."""
    files = {f.name: f.read_text() for f in (PROJECT / "deploy" / "haproxy").iterdir() if f.suffix in (".cfg", ".lua")}
    assert named(rendered["overlays/gpu"], "ConfigMap", "lb-config")["data"] == files


def test_images_are_pinned(rendered: dict[str, list[Document]]) -> None:
    """Every image names a version, and none is "latest"."""
    for found in rendered.values():
        images = re.findall(r'"image": "([^"]+)"', json.dumps(found))
        assert images
        for image in images:
            tag = image.rpartition("/")[2].partition(":")[2]
            assert re.search(r"\d", tag), image


def test_pod_monitors_read_the_metrics_ports() -> None:
    """Each pod monitor selects a deployment's pods, reads a port of theirs, and makes the job that the rules go by."""
    monitors = documents((KUBERNETES / "components" / "monitoring" / "pod-monitors.yaml").read_text())
    assert [monitor["metadata"]["name"] for monitor in monitors] == ["triton", "lb"]
    for monitor in monitors:
        name, specification = monitor["metadata"]["name"], monitor["spec"]
        assert set(specification) == {"jobLabel", "selector", "podMetricsEndpoints"}
        (endpoint,) = specification["podMetricsEndpoints"]
        assert {field: type(value) for field, value in endpoint.items()} == POD_MONITOR_ENDPOINT
        (deployment, *_) = documents((KUBERNETES / "base" / f"{name}.yaml").read_text())
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert specification["selector"]["matchLabels"].items() <= labels.items()
        assert labels[specification["jobLabel"]] == name
        (container,) = pod_of(deployment)["containers"]
        assert endpoint["port"] in [port["name"] for port in container["ports"]]
