"""The deployment's Prometheus on servers of this machine: its own configuration and rules, with short times.

Two things are changed. Targets are given as addresses, where the deployment asks a DNS server for those behind a name.
And every duration is shortened, scrapes and evaluations to a fifth of a second, so that ``for: 5m`` has passed in
seconds. Expressions and thresholds stay.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from balancer import HOST, Balancer, balancer, free_ports, replica_settings
from debian_servers import environment, program
from groundglass_ensemble.embedded import EmbeddedTriton
from waiting import wait_until

FOLDER = Path(__file__).parents[1] / "deploy" / "prometheus"
CONFIGURATION = FOLDER / "prometheus.yml"
RULES = FOLDER / "rules"
INTERVAL = "200ms"
SHORTENED = {"30s": "1s", "1m": "2s", "2m": "2s", "5m": "2s", "10m": "3s", "20m": "4s"}
"""An hour stays: nothing waits for it to pass."""

_WINDOW = re.compile(r"\[(\w+)\]")


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus, through its HTTP API."""

    address: str
    started_s: float

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the API."""
        with urlopen(f"http://{self.address}/api/v1/{path}?{urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now."""
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def query_range(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression had at any time since the start."""
        times = {"start": str(self.started_s), "end": str(time.time()), "step": "0.5"}
        result: list[dict[str, Any]] = self.get("query_range", query=expression, **times)["result"]
        return result

    def targets(self) -> dict[str, list[str]]:
        """The state of every target: up, down, unknown; by job."""
        states: dict[str, list[str]] = {}
        for target in self.get("targets")["activeTargets"]:
            states.setdefault(target["labels"]["job"], []).append(target["health"])
        return states

    def alerts(self, state: str = "firing") -> list[dict[str, str]]:
        """The labels of the alerts in a state."""
        return [alert["labels"] for alert in self.get("alerts")["alerts"] if alert["state"] == state]

    def firing(self, name: str, **labels: str) -> bool:
        """Whether an alert fires, with these labels among its own."""
        wanted = {"alertname": name, **labels}.items()
        return any(wanted <= alert.items() for alert in self.alerts())

    def await_firing(self, name: str, **labels: str) -> None:
        """Return once an alert fires."""
        wait_until(lambda: self.firing(name, **labels), f"the alert {name} {labels or ''}")


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, Sequence[str]]) -> Iterator[Prometheus]:
    """Run the deployment's Prometheus on ``targets``, HOST:PORT by job, with its files in ``folder``."""
    address = f"{HOST}:{free_ports(1)[0]}"
    configuration = write_configuration(folder, {**targets, "prometheus": [address]})
    log_file = folder / "prometheus.log"
    with ExitStack() as running:
        log = running.enter_context(log_file.open("ab"))
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={configuration}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            env=environment(),
            stdout=log,
            stderr=log,
        )
        running.callback(process.wait, 10)
        running.callback(process.kill)
        served = Prometheus(address, time.time())
        wait_until(lambda: _is_ready(process, address, log_file), "Prometheus")
        yield served


@dataclass(frozen=True)
class Monitored:
    """A deployment that is watched."""

    servers: list[EmbeddedTriton]
    balancer: Balancer
    prometheus: Prometheus


@contextmanager
def monitored(folder: Path, repositories: Sequence[Path]) -> Iterator[Monitored]:
    """A server on each repository, the balancer before them, and Prometheus, which has read all of them."""
    settings = replica_settings(repositories[0], len(repositories))
    settings = [replace(one, repository=repository) for one, repository in zip(settings, repositories, strict=True)]
    servers = [EmbeddedTriton(one) for one in settings]
    with ExitStack() as running:
        front = running.enter_context(balancer(settings, folder))
        triton = [f"{one.host}:{one.metrics_port}" for one in settings]
        # First of all: it takes five seconds until it reads its first target.
        watcher = running.enter_context(prometheus(folder, {"triton": triton, "lb": [front.metrics_address]}))
        running.callback(_all, EmbeddedTriton.stop, servers)
        _all(EmbeddedTriton.start, servers)
        front.await_replicas(len(servers))
        everything = {"triton": ["up"] * len(servers), "lb": ["up"], "prometheus": ["up"]}
        wait_until(lambda: watcher.targets() == everything, "all targets")
        yield Monitored(servers, front, watcher)


def _all(act: Callable[[EmbeddedTriton], None], servers: list[EmbeddedTriton]) -> None:
    with ThreadPoolExecutor(len(servers)) as acting:
        list(acting.map(act, servers))


def write_configuration(folder: Path, targets: Mapping[str, Sequence[str]]) -> Path:
    """The deployment's configuration and rules, with targets that are given and durations that are short."""
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    configuration["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), INTERVAL)
    for job in configuration["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": list(targets[job["job_name"]])}]
    rules = folder / "rules"
    rules.mkdir()
    for file in RULES.glob("*.yml"):
        (rules / file.name).write_text(yaml.safe_dump(shortened(yaml.safe_load(file.read_text()))))
    configuration["rule_files"] = [f"{rules}/*.yml"]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration))
    return path


def shortened(rules: dict[str, Any]) -> dict[str, Any]:
    """The same rules with short windows and waits. Changes and returns ``rules``."""
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = _WINDOW.sub(lambda window: f"[{SHORTENED.get(window[1], window[1])}]", rule["expr"])
            if "for" in rule:
                rule["for"] = SHORTENED[rule["for"]]
    return rules


def all_rules() -> list[dict[str, str]]:
    """Every rule of the deployment as it is written."""
    files = sorted(RULES.glob("*.yml"))
    return [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def _is_ready(process: subprocess.Popen[bytes], address: str, log_file: Path) -> bool:
    assert process.poll() is None, log_file.read_text()
    try:
        with urlopen(f"http://{address}/-/ready", timeout=1) as answer:
            return bool(answer.status == 200)
    except (URLError, ConnectionError):
        return False
