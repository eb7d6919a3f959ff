"""docs/operations.md: every alert has its row, every command exists, and the output that it shows is what comes out."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from command import groundglass
from groundglass.cli import app

PROJECT = Path(__file__).parents[2]
GUIDE = (PROJECT / "docs" / "operations.md").read_text()
ALERTS = PROJECT / "deploy" / "prometheus" / "rules" / "alerts.yml"
PROGRAM = "groundglass"


def alert_names() -> list[str]:
    """The alerts that Prometheus knows."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]


def commands() -> list[str]:
    """Every call of the command line in the guide, in blocks and in the text."""
    block = r"^(?:\$ )?(groundglass .*)$"
    return sorted({*re.findall(block, GUIDE, re.MULTILINE), *re.findall(r"`(groundglass [^`]+)`", GUIDE)})


def test_every_alert_has_a_row_and_every_row_an_alert() -> None:
    """An alert's link leads to the row that names it, and no row is left of an alert that is gone."""
    rows = re.findall(r'^\| <a id="alert-(\w+)"></a>(\w+) \| [^|]+ \| [^|]+ \|$', GUIDE, re.MULTILINE)
    assert sorted(name for _, name in rows) == sorted(alert_names())
    assert all(anchor == name.lower() for anchor, name in rows)
    for name in alert_names():
        assert f"docs/operations.md#alert-{name.lower()}" in ALERTS.read_text()


@pytest.mark.parametrize("call", commands())
def test_every_command_exists_with_its_options(call: str) -> None:
    """A command that the guide tells to type is one of the command line, and so are its options."""
    words = shlex.split(call)
    assert words.pop(0) == PROGRAM
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, call
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known, call


def test_the_environment_variables_are_those_of_the_command_line() -> None:
    """A variable that the guide sets is read by a command."""
    help_text = "".join(groundglass("models", "promote", "--help").stdout.split())
    exported = re.findall(r"^export (GROUNDGLASS_\w+)=", GUIDE, re.MULTILINE)
    assert exported
    assert [name for name in exported if name not in help_text] == []


def test_the_calculator_says_what_the_guide_shows() -> None:
    """The example's output is the command's own, from the result that is in the repository."""
    call, output = re.search(r"^\$ (groundglass capacity .*)\n((?:.*\n)+?)```", GUIDE, re.MULTILINE).groups()
    arguments = [PROJECT / word if word.endswith(".json") else word for word in shlex.split(call)[1:]]
    done = groundglass(*arguments, "--repository", PROJECT / "model_repository")
    assert done.stdout.replace(f"{PROJECT}/", "") == output


def test_links_lead_to_files() -> None:
    """Every file that the guide links to is there."""
    linked = re.findall(r"\]\(([^)#]+)\)", GUIDE)
    assert linked
    assert [target for target in linked if not (PROJECT / "docs" / target).exists()] == []
