"""Which version is loaded and which is live stands in two lines of the configs, and these lines alone are rewritten."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundglass import contract
from groundglass.errors import RepositoryError
from groundglass_ensemble.repository import live_of, policy_of
from groundglass_ensemble.versions import configs

REPOSITORY = Path(__file__).parents[3] / "model_repository"
UNET = (REPOSITORY / "unet" / "config.pbtxt").read_text()
CT_SCAN = (REPOSITORY / "ct_scan" / "config.pbtxt").read_text()
VERSIONS = st.lists(st.integers(1, 10_000), min_size=1, max_size=5, unique=True)


@given(VERSIONS, VERSIONS)
def test_a_version_policy_is_written_and_replaced(first: list[int], second: list[int]) -> None:
    """The policy read is the one written last, and everything else of the config is as it was, comments too."""
    once = configs.with_policy(UNET, first)
    twice = configs.with_policy(once, second)
    assert policy_of(configs.parse(once)) == tuple(sorted(first))
    assert policy_of(configs.parse(twice)) == tuple(sorted(second))
    assert twice.startswith(UNET.rstrip("\n"))
    assert twice.count("version_policy") == 1
    stripped = configs.parse(twice)
    stripped.ClearField("version_policy")
    assert stripped == configs.parse(UNET)


@pytest.mark.parametrize(
    "policy",
    [
        "version_policy: { latest { num_versions: 2 } }",
        "version_policy { all { } }",
        "version_policy: { specific: { versions: [1, 2] } }",
        "version_policy {\n  specific {\n    versions: 1\n    versions: 2\n  }\n}",
        "version_policy { specific { versions: 1 } } # of { braces }",
        "dynamic_batching { } version_policy { specific { versions: 1 } }",
    ],
)
def test_any_way_to_write_a_policy_is_understood(policy: str) -> None:
    """A policy that somebody wrote by hand is replaced, whatever its form."""
    text = 'name: "unet"\nbackend: "onnxruntime"\n' + policy + "\nmax_batch_size: 64\n"
    rewritten = configs.parse(configs.with_policy(text, [7]))
    assert policy_of(rewritten) == (7,)
    assert rewritten.max_batch_size == 64


def test_a_plain_config_names_no_version() -> None:
    """Without a policy Triton chooses, and without a number the ensemble takes the newest."""
    assert policy_of(configs.parse(UNET)) is None
    assert live_of(configs.parse(CT_SCAN)) == contract.NEWEST


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_the_live_version_is_written_and_replaced(first: int, second: int) -> None:
    """Another version takes the place of the one before, and the text around it stays."""
    twice = configs.with_live(configs.with_live(CT_SCAN, first), second)
    assert live_of(configs.parse(twice)) == second
    assert twice == CT_SCAN.replace(
        'model_name: "unet"\n      model_version: -1', f'model_name: "unet"\n      model_version: {second}'
    )


def test_a_step_in_another_form_is_understood() -> None:
    """Fields in another order still give the intended config."""
    text = (
        'name: "ct_scan" platform: "ensemble" ensemble_scheduling { step { '
        'model_version: -1 model_name: "unet" input_map { key: "IMAGE" value: "IMAGE" } } }'
    )
    assert live_of(configs.parse(configs.with_live(text, 3))) == 3


def test_the_ensemble_of_a_version_is_ct_scan_but_for_name_and_version() -> None:
    """It takes and gives what ct_scan does, under its own name, with its own version."""
    pinned = configs.parse(configs.pinned_ensemble(CT_SCAN, 4))
    assert (pinned.name, live_of(pinned)) == ("ct_scan_v4", 4)
    expected = configs.parse(configs.with_live(CT_SCAN, 4))
    expected.name = "ct_scan_v4"
    assert pinned == expected


def test_what_is_no_config_is_refused() -> None:
    """A text that Triton could not read is not rewritten, and an ensemble without the network is named."""
    with pytest.raises(RepositoryError, match="no Triton model config"):
        configs.with_policy("name: unet {", [1])
    with pytest.raises(RepositoryError, match="other has no step unet"):
        configs.with_live('name: "other" platform: "ensemble"', 1)
