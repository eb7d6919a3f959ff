"""Every option that a deployment gives to tritonserver is one that it has, in the version that is deployed or here."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml

from compose_file import PROJECT, command_of, services
from groundglass_ensemble.wheel import find_wheel, server_environment

KNOWN_FLAGS = Path(__file__).parent / "triton_flags_26.txt"


def test_every_flag_is_one_of_triton() -> None:
    """Compose, Kubernetes and serve.sh give no option that neither newer servers nor the embedded one know."""
    wheel = find_wheel()
    said = subprocess.run([wheel.server, "--help"], capture_output=True, text=True, env=server_environment(wheel))
    known = set(re.findall(r"^  (--[\w-]+)", said.stdout + said.stderr, re.MULTILINE))
    known |= {line for line in KNOWN_FLAGS.read_text().splitlines() if not line.startswith("#")}
    assert "--model-repository" in known
    for place, flags in given_flags().items():
        assert flags, place
        assert flags <= known, place


def given_flags() -> dict[str, set[str]]:
    """Options of tritonserver, by who gives them."""
    given = {name: " ".join(command_of(services()[name])) for name in ("triton", "triton-cpu")}
    script = (PROJECT / "deploy" / "serve.sh").read_text()
    given["serve.sh"] = "\n".join(line for line in script.splitlines() if not line.lstrip().startswith("#"))
    for file in sorted((PROJECT / "deploy" / "kubernetes").rglob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            for container in containers(document):
                if any("serve.sh" in word for word in container.get("command", [])):
                    given[str(file)] = json.dumps(container.get("args", []))
    return {place: set(re.findall(r"(?<![\w-])(--[a-z][\w-]+)", text)) - {"--help"} for place, text in given.items()}


def containers(part: object) -> Iterator[dict[str, list[str]]]:
    """All objects in a manifest that have a command."""
    if isinstance(part, dict):
        if "command" in part and "image" in part:
            yield part
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from containers(inner)
