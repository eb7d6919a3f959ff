"""The script that builds a plan in the container: what it refuses before it installs anything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "build_plan.sh"


def refused(tmp_path: Path, *arguments: object) -> str:
    """The one line that the script ends with, on a machine without TensorRT."""
    (tmp_path / "dpkg-query").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "dpkg-query").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "TRT_VERSION"}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    command = [str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("arguments", [(), ("model.onnx",)])
def test_both_files_must_be_named(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Without a model and a plan the script says what it expects."""
    assert "expected MODEL.onnx (FP16) and MODEL.plan" in refused(tmp_path, *arguments)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    """A graph that is not there is told with the command that makes it."""
    assert "none.onnx: no such file; make it with groundglass export fp16" in refused(tmp_path, "none.onnx", "x.plan")


def test_a_container_without_tensorrt_is_refused(tmp_path: Path) -> None:
    """Where no TensorRT is installed, nothing is downloaded and no plan appears."""
    model = tmp_path / "model.onnx"
    model.write_bytes(b"graph")
    assert "this container has no TensorRT" in refused(tmp_path, model, tmp_path / "model.plan")
    assert not (tmp_path / "model.plan").exists()
