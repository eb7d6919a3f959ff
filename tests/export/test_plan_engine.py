"""Plans as engines of the parity gate: what they need is named where it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from groundglass.errors import ModelError, RepositoryError
from groundglass_export.plan_engine import PlanEngine


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    """A path that leads nowhere is told before a GPU is asked for."""
    with pytest.raises(ModelError, match=r"model\.plan: no such file"):
        PlanEngine(tmp_path / "model.plan")


def test_a_plan_that_is_not_its_manifests_is_refused(tmp_path: Path) -> None:
    """The manifest is read first: a damaged one is named, GPU or not."""
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"plan")
    (tmp_path / "model.plan.manifest.json").write_text("no manifest")
    with pytest.raises(RepositoryError, match=r"model\.plan\.manifest\.json"):
        PlanEngine(plan)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_plan_needs_a_gpu(tmp_path: Path) -> None:
    """Without a GPU one line says where a plan can be verified."""
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"plan")
    with pytest.raises(ModelError, match=r"a plan can be verified only where it runs: .* finds no GPU") as failure:
        PlanEngine(plan)
    assert "\n" not in str(failure.value)
