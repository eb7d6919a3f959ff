"""The network policies, evaluated as Kubernetes defines them: who may speak to whom."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

Policy = dict[str, Any]

POLICIES: list[Policy] = list(
    yaml.safe_load_all(
        (Path(__file__).parents[2] / "deploy" / "kubernetes" / "base" / "network-policy.yaml").read_text()
    )
)
PORTS = (
    ("TCP", 8000),
    ("TCP", 8001),
    ("TCP", 8002),
    ("TCP", 8404),
    ("TCP", 8443),
    ("TCP", 53),
    ("UDP", 53),
    ("TCP", 443),
)
PARTS = ("triton", "lb", "model-control")


@dataclass(frozen=True)
class Peer:
    """A pod by its labels and namespace, or a host outside the cluster, which has neither."""

    labels: tuple[tuple[str, str], ...] = ()
    namespace: str | None = None


def part(component: str) -> Peer:
    """A pod of the deployment."""
    labels = {"app.kubernetes.io/part-of": "groundglass", "app.kubernetes.io/component": component}
    return Peer(tuple(labels.items()), "ours")


PEERS = {
    **{name: part(name) for name in PARTS},
    "prometheus": Peer((("app.kubernetes.io/name", "prometheus"),), "monitoring"),
    "dns": Peer((("k8s-app", "kube-dns"),), "kube-system"),
    "outside": Peer(),
    "neighbour": Peer((("app", "other"),), "ours"),
    "elsewhere": Peer(part("lb").labels, "theirs"),
    "false prometheus": Peer((("app.kubernetes.io/name", "prometheus"),), "theirs"),
}
"""Who there is; the last three try to pass for somebody."""

INTENDED = {
    ("lb", "triton", "TCP", 8000),
    ("lb", "triton", "TCP", 8001),
    ("model-control", "triton", "TCP", 8001),
    ("prometheus", "triton", "TCP", 8002),
    ("prometheus", "lb", "TCP", 8404),
    *(("lb", "dns", protocol, 53) for protocol in ("TCP", "UDP")),
    *(("model-control", "dns", protocol, 53) for protocol in ("TCP", "UDP")),
    # Anybody may knock at the balancer, our own servers excepted, which speak to nobody.
    *((name, "lb", "TCP", 8443) for name in PEERS if name not in PARTS),
}


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector selects; ours use matchLabels only."""
    assert set(selector) <= {"matchLabels"}
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def selects(peer: Policy, other: Peer, namespace: str) -> bool:
    """Whether an entry of ``from`` or ``to``, of a policy in ``namespace``, means ``other``."""
    assert set(peer) <= {"podSelector", "namespaceSelector"}
    if other.namespace is None:
        return False
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}):
            return False
    elif other.namespace != namespace:
        return False
    return matches(peer.get("podSelector", {}), dict(other.labels))


def permits(policies: list[Policy], way: str, pod: Peer, other: Peer, port: tuple[str, int]) -> bool:
    """Whether ``pod`` may take from ("Ingress") or send to ("Egress") ``other``; a pod that no policy selects may."""
    mine = [
        policy["spec"]
        for policy in policies
        if pod.namespace == "ours" and matches(policy["spec"]["podSelector"], dict(pod.labels))
        if way in policy["spec"]["policyTypes"]
    ]
    rules = [rule for specification in mine for rule in specification.get(way.lower(), [])]
    side = "from" if way == "Ingress" else "to"
    return not mine or any(
        (side not in rule or any(selects(peer, other, "ours") for peer in rule[side]))
        and ("ports" not in rule or port in [(open_.get("protocol", "TCP"), open_["port"]) for open_ in rule["ports"]])
        for rule in rules
    )


def flows(policies: list[Policy]) -> set[tuple[str, str, str, int]]:
    """Every connection from or to a pod of ours that the policies let through."""
    return {
        (source, target, *port)
        for (source, target), port in product(product(PEERS, PEERS), PORTS)
        if source in PARTS or target in PARTS
        if permits(policies, "Egress", PEERS[source], PEERS[target], port)
        and permits(policies, "Ingress", PEERS[target], PEERS[source], port)
    }


def test_only_the_intended_flows_pass() -> None:
    """Of all connections between our pods, neighbours and the world, on every port in use, just these work."""
    assert flows(POLICIES) == INTENDED


@pytest.mark.parametrize("missing", range(len(POLICIES)), ids=[policy["metadata"]["name"] for policy in POLICIES])
def test_every_policy_counts(missing: int) -> None:
    """Without any one of the policies something else would pass, or something would not."""
    assert flows(POLICIES[:missing] + POLICIES[missing + 1 :]) != INTENDED
