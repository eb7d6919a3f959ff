"""Groundglass under KServe: fields that KServe has, and the same server as in our own deployment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from referencing import Registry, Resource

Document = dict[str, Any]

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"


def documents(text: str) -> list[Document]:
    """The resources of a YAML stream."""
    return [document for document in yaml.safe_load_all(text) if document]


def settings(container: Document) -> dict[str, str]:
    """The environment of a container."""
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


def kserve_errors(value: Any, kind: str, kinds: dict[str, dict[str, str]], where: str = "") -> Iterator[str]:
    """Where ``value`` is not of KServe's ``kind``: unknown fields and wrong types, Kubernetes' own kinds included."""
    plain = {"str": str, "int": int, "bool": bool}
    if kind in kinds:
        for field, content in value.items():
            if field not in kinds[kind]:
                yield f"{where}.{field} is unknown to {kind}"
            else:
                yield from kserve_errors(content, kinds[kind][field], kinds, f"{where}.{field}")
    elif kind in plain:
        if type(value) is not plain[kind]:
            yield f"{where} is no {kind}"
    elif kind.startswith("list["):
        for number, entry in enumerate(value):
            yield from kserve_errors(entry, kind[5:-1], kinds, f"{where}[{number}]")
    elif kind == "V1ObjectMeta":
        assert set(value) <= {"name", "labels", "annotations"}
    else:
        name = kind.removeprefix("K8sIoApiAppsV1")
        group = "core.v1" if name == kind else "apps.v1"
        yield from kubernetes_errors(value, f"io.k8s.api.{group}.{name.removeprefix('V1')}", where)


def kubernetes_errors(value: Any, definition: str, where: str) -> Iterator[str]:
    """Where ``value`` is not what Kubernetes defines under a name."""
    folder = (
        Path(kubernetes_validate.__path__[0])
        / "kubernetes-json-schema"
        / f"v{kubernetes_validate.latest_version()}-local-strict"
    )
    definitions = json.loads((folder / "_definitions.json").read_text())
    registry = Resource.from_contents(definitions) @ Registry()
    schema = {"$ref": f"{definitions['$id']}#/$defs/{definition}"}
    for error in jsonschema.Draft202012Validator(schema, registry=registry).iter_errors(value):
        yield f"{where}: {error.message}"


@pytest.fixture(scope="module")
def kserve() -> dict[str, Document]:
    """Our KServe resources by kind."""
    texts = [(KUBERNETES / "kserve" / f"{name}.yaml").read_text() for name in ("serving-runtime", "inference-service")]
    return {document["kind"]: document for text in texts for document in documents(text)}


@pytest.fixture(scope="module")
def kserve_kinds() -> dict[str, dict[str, str]]:
    """Fields and types of KServe's kinds."""
    kinds: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "kserve_fields.json").read_text())["kinds"]
    return kinds


def test_kserve_knows_every_field(kserve: dict[str, Document], kserve_kinds: dict[str, dict[str, str]]) -> None:
    """Runtime and service use only fields that KServe has, with the types that it or Kubernetes gives them."""
    assert (kserve["ServingRuntime"]["apiVersion"], kserve["InferenceService"]["apiVersion"]) == (
        "serving.kserve.io/v1alpha1",
        "serving.kserve.io/v1beta1",
    )
    assert list(kserve_errors(kserve["ServingRuntime"], "V1alpha1ServingRuntime", kserve_kinds)) == []
    assert list(kserve_errors(kserve["InferenceService"], "V1beta1InferenceService", kserve_kinds)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.update(container=[]), ".spec.container is unknown"),
        (lambda spec: spec.update(multiModel="no"), ".spec.multiModel is no bool"),
        (lambda spec: spec["containers"][0].update(imag="x"), "'imag' was unexpected"),
        (lambda spec: spec["containers"][0]["ports"][0].update(containerPort="x"), "'x' is not of type"),
    ],
    ids=["field", "type", "container field", "container type"],
)
def test_wrong_kserve_fields_are_noticed(
    kserve: dict[str, Document], kserve_kinds: dict[str, dict[str, str]], change: Any, message: str
) -> None:
    """A field or type that is wrong anywhere is told, so the test before can fail."""
    runtime = json.loads(json.dumps(kserve["ServingRuntime"]))
    change(runtime["spec"])
    errors = list(kserve_errors(runtime, "V1alpha1ServingRuntime", kserve_kinds))
    assert len(errors) == 1
    assert message in errors[0]


def test_kserve_runs_the_same_server(kserve: dict[str, Document]) -> None:
    """KServe's container is the deployment's: image, command, flags, probes, limits, confinement, and a gRPC port."""
    runtime, service = kserve["ServingRuntime"]["spec"], kserve["InferenceService"]["spec"]["predictor"]
    (deployment, *_) = documents((KUBERNETES / "base" / "triton.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (server,), (kept,) = runtime["containers"], pod["containers"]
    for field in ("image", "command", "args", "startupProbe", "readinessProbe", "livenessProbe", "lifecycle"):
        assert server[field] == kept[field], field
    assert server["securityContext"].items() >= kept["securityContext"].items()
    assert settings(server).items() >= settings(kept).items()
    assert server["ports"] == [{"name": "h2c", "containerPort": 8001, "protocol": "TCP"}]
    assert service["terminationGracePeriodSeconds"] == pod["terminationGracePeriodSeconds"]
    assert service["model"]["runtime"] == kserve["ServingRuntime"]["metadata"]["name"]
    assert service["model"]["modelFormat"].items() <= runtime["supportedModelFormats"][0].items()
    assert service["model"]["protocolVersion"] in runtime["protocolVersions"]
