"""`groundglass export`: a checkpoint becomes models that are proved before they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from groundglass.cli.terminal import extra

export_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Turn a checkpoint into served models.")


@export_app.command(
    "onnx", epilog="Example: groundglass export onnx --checkpoint unet.safetensors --out model_repository"
)
def export_onnx_command(
    checkpoint: Annotated[Path, typer.Option(help="Trained U-Net: .safetensors, or a .pt/.pth of tensors only.")],
    out: Annotated[Path, typer.Option(help="Model repository to write preprocess/1 and unet/1 into.")],
) -> None:
    """Write the preprocess and unet graphs as ONNX FP32, checked against torch, each with its manifest."""
    with extra("export"):
        from groundglass_export.onnx_export import export_onnx
    for model_file in export_onnx(checkpoint, out):
        print(model_file)
