"""`groundglass train`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from groundglass.cli.terminal import extra, increments, progress


def train(
    recipe: Annotated[
        Path, typer.Option(help="TOML file: data, stages, rates. What it leaves out is as the paper trained.")
    ],
    data: Annotated[Path, typer.Option(envvar="GROUNDGLASS_DATA", help="Folder that the recipe's paths start from.")],
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints and metrics; an interrupted training there continues.")
    ],
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Stop after so long. Default: when the recipe's epochs are over.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many steps, however fast the machine is.")
    ] = None,
    imagenet: Annotated[
        Path | None, typer.Option(help="Keras Xception weights as .npz for the encoder; random without it.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: the GPU, where there is one.")] = None,
    start: Annotated[Path | None, typer.Option(help="Checkpoint to start from, instead of --imagenet.")] = None,
) -> None:
    """Train the network; print the path of the best checkpoint."""
    with extra("train"):
        from groundglass_export.training.loop import Budget
        from groundglass_export.training.loop import train as train_network
        from groundglass_export.training.recipe import read_recipe
    with progress("training, %", 100) as advance:
        show = increments(advance)
        best = train_network(
            read_recipe(recipe),
            data,
            out,
            Budget(math.inf if minutes is None else minutes, steps),
            imagenet,
            lambda line: show(int(100 * line["share"])) if "share" in line else None,
            start,
            device,
        )
    print(best)
