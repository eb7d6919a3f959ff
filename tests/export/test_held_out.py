"""What the shipped labelled sets say that training never saw, the shipped recipes hold out."""

from __future__ import annotations

from pathlib import Path

import pytest

from groundglass_export.evaluation.labelled_set import (
    NEVER,
    HealthySeries,
    LabelledImages,
    LabelledSeries,
    MaskedImages,
    SetSource,
    read_labelled_set,
)
from groundglass_export.training.recipe import Source, read_recipe

EXPORT = Path(__file__).parents[2] / "export"
RECIPES_OF = {
    "reference": ("reference", "images"),
    "fold_a": ("fold_a",),
    "fold_b": ("fold_b",),
    "fold_b_images": ("fold_b", "fold_b_images"),
    "fold_c": ("fold_c",),
}
"""By labelled set: the recipes that trained what it is for, one after the other."""


def _slices_of(source: SetSource) -> set[tuple[str, int]]:
    """A set's source as parts that a recipe can hold out: a folder, and the number of a scan or fold of it."""
    if isinstance(source, MaskedImages):
        return {(source.folder, scan) for scan in source.scans or range(len(source.scan_starts))}
    if isinstance(source, LabelledImages):
        return {(source.positive, fold) for fold in source.fold_numbers or range(source.folds)}
    assert isinstance(source, HealthySeries | LabelledSeries)
    return {(source.folder, 0)}


def _trained_on(source: Source) -> set[tuple[str, int]]:
    parts = source.folds if source.kind == "labelled_images" else len(source.scan_starts)
    held_out = {*source.validation_scans, *source.test_scans, *source.validation_folds, *source.test_folds}
    return {(source.name, part) for part in set(range(parts)) - held_out}


def _chosen_on(source: Source) -> set[tuple[str, int]]:
    return {(source.name, part) for part in (*source.validation_scans, *source.validation_folds)}


@pytest.mark.parametrize("name", RECIPES_OF)
def test_sets_say_what_recipes_saw(name: str) -> None:
    """Never seen is neither trained nor chosen on; chosen on is not trained on, by any of the recipes."""
    recipes = [read_recipe(EXPORT / "recipes" / f"{recipe}.toml") for recipe in RECIPES_OF[name]]
    sources = [source for recipe in recipes for source in recipe.sources]
    trained = {part for source in sources for part in _trained_on(source)}
    chosen = {part for source in sources for part in _chosen_on(source)}
    for source in read_labelled_set(EXPORT / "evaluation" / f"{name}.toml").sources:
        if source.seen != "trained on":
            assert not _slices_of(source) & trained, source.name
        if source.seen == NEVER:
            assert not _slices_of(source) & chosen, source.name


@pytest.mark.parametrize("name", RECIPES_OF)
def test_recipes_and_sets_divide_data_alike(name: str) -> None:
    """A scan or fold has the same number in a set and in its recipes: both name the same starts and number of folds."""
    recipes = [read_recipe(EXPORT / "recipes" / f"{recipe}.toml") for recipe in RECIPES_OF[name]]
    divided = {source.name: (source.scan_starts, source.folds) for recipe in recipes for source in recipe.sources}
    for source in read_labelled_set(EXPORT / "evaluation" / f"{name}.toml").sources:
        if isinstance(source, MaskedImages):
            assert divided[source.folder][0] == source.scan_starts
        if isinstance(source, LabelledImages) and source.positive in divided:
            assert divided[source.positive][1] == source.folds
