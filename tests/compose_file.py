"""docker-compose.yml as docker compose reads it: with the settings of .env.example in place of its variables."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[1]
COMPOSE_FILE = PROJECT / "docker-compose.yml"
SETTINGS_FILE = PROJECT / ".env.example"
VARIABLE = re.compile(r"\$\{(\w+):\?copy \.env\.example to \.env\}")
IMAGE_FOLDER = "/opt/groundglass/"
"""Where our files lie in our images, as they do in the project."""


def settings() -> dict[str, str]:
    """Names and values of .env.example."""
    lines = [line for line in SETTINGS_FILE.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def variables() -> set[str]:
    """Names of the settings that docker-compose.yml asks for."""
    return set(VARIABLE.findall(COMPOSE_FILE.read_text()))


def compose() -> dict[str, Any]:
    """The whole file; a variable without a setting is a KeyError."""
    filled: dict[str, Any] = _filled(yaml.safe_load(COMPOSE_FILE.read_text()), settings())
    return filled


def services() -> dict[str, dict[str, Any]]:
    """The services, by name."""
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def command_of(service: dict[str, Any]) -> list[str]:
    """What its container runs: entrypoint and command."""
    return [*service.get("entrypoint", []), *service.get("command", [])]


def mounts_of(service: dict[str, Any]) -> dict[str, str]:
    """Folders that it mounts from the host, by their path in the container."""
    split = [volume.split(":") for volume in service.get("volumes", [])]
    return {parts[1]: parts[0] for parts in split if parts[0].startswith((".", "/"))}


def on_host(service: dict[str, Any], path: str) -> Path:
    """Where a path of its container lies in the project: in a mounted folder, or copied into the image."""
    if path.startswith(IMAGE_FOLDER):
        return PROJECT / path.removeprefix(IMAGE_FOLDER)
    for target, source in sorted(mounts_of(service).items(), key=lambda mount: len(mount[0]), reverse=True):
        if path == target or path.startswith(f"{target}/"):
            return PROJECT / source / path[len(target) :].lstrip("/")
    raise AssertionError(f"{path} is neither mounted nor ours")


def make_secrets(folder: Path) -> Path:
    """Fill a new folder as the script of the deployment does."""
    subprocess.run([PROJECT / "deploy" / "make_certificates.sh", folder], check=True, capture_output=True)
    return folder


def _filled(part: Any, chosen: dict[str, str]) -> Any:
    """With variables replaced in strings, which stay strings, as docker compose does it: after YAML was read."""
    if isinstance(part, dict):
        return {key: _filled(value, chosen) for key, value in part.items()}
    if isinstance(part, list):
        return [_filled(value, chosen) for value in part]
    return VARIABLE.sub(lambda found: chosen[found[1]], part) if isinstance(part, str) else part
