"""What Prometheus is given, as its own tool judges it; and rules that say what they must."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from balancer import HOST
from debian_servers import environment, program
from metrics_server import CONFIGURATION, FOLDER, RULES, all_rules, write_configuration

RULE_TESTS = FOLDER / "tests" / "alerts.yml"
ALERTS = [rule for rule in all_rules() if "alert" in rule]
OPERATIONS = FOLDER.parents[1] / "docs" / "operations.md"


def promtool(*arguments: str | Path) -> str:
    """What promtool says, which must be content."""
    command = [program("promtool"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_configuration_and_rules_are_valid(tmp_path: Path) -> None:
    """Prometheus' tool accepts the files as they are, and the configuration together with the rules."""
    promtool("check", "config", "--syntax-only", CONFIGURATION)
    promtool("check", "rules", *sorted(RULES.glob("*.yml")))
    checked = promtool("check", "config", write_configuration(tmp_path, {"triton": [], "lb": [], "prometheus": []}))
    assert "2 rule files found" in checked


def test_targets_are_found_by_the_names_of_services() -> None:
    """Every five seconds all replicas behind the name triton are read, and the balancers behind lb."""
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    found = {job["job_name"]: job.get("dns_sd_configs", [None])[0] for job in configuration["scrape_configs"]}
    assert configuration["global"]["scrape_interval"] == "5s"
    wanted = {"type": "A", "refresh_interval": "5s"}
    assert found["triton"] == {"names": ["triton"], "port": 8002, **wanted}
    assert found["lb"] == {"names": ["lb"], "port": 8404, **wanted}
    assert set(found) == {"triton", "lb", "prometheus"}


def test_alerts_fire_when_they_must_and_keep_quiet_otherwise() -> None:
    """Every alert is tried on made-up series, with the cases that look like trouble and are none."""
    assert "SUCCESS" in promtool("test", "rules", RULE_TESTS)


def test_no_alert_is_left_out_of_those_trials() -> None:
    """The file of made-up series expects each alert to fire somewhere."""
    trials = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    expected = {
        re.search(r'alertname="(\w+)"', sample["labels"])[1]  # type: ignore[index]
        for trial in trials
        for query in trial.get("promql_expr_test", ())
        for sample in query.get("exp_samples", ())
        if "alertname" in sample["labels"]
    }
    expected |= {
        check["alertname"] for trial in trials for check in trial.get("alert_rule_test", ()) if check.get("exp_alerts")
    }
    assert expected == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, object]) -> None:
    """A severity, a wait before it fires, a summary, and a description that ends at a place in the operations' page."""
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"})
    annotations = rule["annotations"]
    assert isinstance(annotations, dict)
    assert annotations["summary"]
    anchor = f"alert-{str(rule['alert']).lower()}"
    assert annotations["description"].endswith(f"What to do: docs/operations.md#{anchor}")
    place = rf"(id|name)=\"{anchor}\"|^#+ alert:? {rule['alert']}$"
    assert re.search(place, OPERATIONS.read_text(), re.MULTILINE | re.IGNORECASE), f"{rule['alert']} in {OPERATIONS}"


def test_no_rule_waits_for_a_time_that_the_tests_do_not_shorten(tmp_path: Path) -> None:
    """The configuration that the live tests use differs in durations and targets alone."""
    path = write_configuration(tmp_path, {"triton": [f"{HOST}:1"], "lb": [], "prometheus": []})
    used = [
        rule
        for file in sorted((path.parent / "rules").glob("*.yml"))
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
    ]
    durations = re.compile(r"\[\w+\]")
    assert [durations.sub("", rule["expr"]) for rule in used] == [
        durations.sub("", rule["expr"]) for rule in all_rules()
    ]
    assert {rule["for"] for rule in used if "for" in rule} <= {"1s", "2s", "3s"}
