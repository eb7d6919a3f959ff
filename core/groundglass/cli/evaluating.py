"""`groundglass evaluate`: the paper's tables of a checkpoint, an exported graph or a live server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from groundglass.cli.connecting import speaks_tls
from groundglass.cli.terminal import extra, progress
from groundglass.errors import SettingError
from groundglass.publish import published
from groundglass.tls import TlsSettings

if TYPE_CHECKING:
    from groundglass.study import Study
    from groundglass_client.transport import Transport
    from groundglass_export.evaluation import EvaluationReport, ModelIdentity, PooledReport, Predictions, Predictor
    from groundglass_export.evaluation.prediction import DecodeHu

REQUEST_TIMEOUT_S: Final = 900.0
"""A chunk of small images holds up to 64 slices, and a window of four chunks queues: minutes on a CPU."""

_WAYS: Final = ("--checkpoint", "--model", "--server")


@speaks_tls
def evaluate(
    labelled_set: Annotated[Path, typer.Option("--set", help="TOML file that describes the labelled set.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Evaluate a checkpoint: .safetensors, .pt or .pth.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Evaluate an exported unet graph: .onnx (or .plan, on a GPU).")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Evaluate a live server: Triton's gRPC endpoint, HOST:PORT.")
    ] = None,
    tls: TlsSettings | None = None,
    data: Annotated[
        Path | None,
        typer.Option(envvar="GROUNDGLASS_DATA", help="Folder that the set's paths start from. Default: the set's own."),
    ] = None,
    preprocess: Annotated[
        Path | None, typer.Option(help="Preprocess graph for --model. Default: that of the model's repository.")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - for stdout.")
    ] = None,
) -> None:
    """Hold a model against a labelled set; print slice, mask and scan figures with 95 % intervals."""
    with extra("train"):
        from groundglass_export import evaluation
    from groundglass_client import intake

    _require_one_way(checkpoint, model, server)
    _require_writable(json_file)
    labelled = evaluation.read_labelled_set(labelled_set)
    with (
        evaluation.opened_set(labelled, data or labelled_set.parent, intake) as sources,
        _predictor(checkpoint, model, server, preprocess, tls=tls) as predictor,
        progress("slices", evaluation.slice_total(sources)) as advance,
    ):
        found = evaluation.evaluate(sources, predictor, intake.decode_hu, advance)
    _print(evaluation.build_report(labelled, found), json_file)


def pool(
    reports: Annotated[list[Path], typer.Argument(help="Reports that groundglass evaluate --json wrote.")],
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the tables as JSON; - for stdout.")
    ] = None,
) -> None:
    """Pool reports of a cross-validation: each model on the sources that it never saw, as one table."""
    with extra("train"):
        from groundglass_export.evaluation import pool_reports
    _require_writable(json_file)
    _print(pool_reports(reports), json_file)


class ServedModel:
    """A live server as a predictor: what a user of it would be answered, chunks and scan verdicts included."""

    def __init__(self, transport: Transport, address: str) -> None:
        self._transport = transport
        self._address = address
        self._versions: set[str] = set()
        self._positive_run: int | None = None

    def predict(self, study: Study, decode_hu: DecodeHu, on_slices: Callable[[int], None]) -> Predictions:
        """See ``Predictor.predict``."""
        import numpy as np

        from groundglass_client.session import SessionSettings, analyse
        from groundglass_export.evaluation import Predictions

        settings = SessionSettings(masks=True, request_timeout_s=REQUEST_TIMEOUT_S)
        analysis = analyse(study, self._transport, decode_hu, settings, on_slices)
        report = analysis.report
        self._versions.add(report.model_version)
        self._positive_run = report.positive_run
        if analysis.masks is None:
            raise TypeError("masks were asked for")
        return Predictions(
            masks=analysis.masks,
            pixels=np.array([result.lesion_pixels for result in report.slices], dtype=np.int32),
            positive=np.array([result.positive for result in report.slices], dtype=np.bool_),
        )

    def identity(self) -> ModelIdentity:
        """See ``Predictor.identity``."""
        from groundglass_export.evaluation import ModelIdentity
        from groundglass_export.provenance import current_versions

        return ModelIdentity(
            way="server",
            name=self._address,
            version=" and ".join(sorted(self._versions)),
            positive_run=self._positive_run,
            versions=current_versions(("groundglass", "numpy", "tritonclient")),
        )


@contextmanager
def _predictor(
    checkpoint: Path | None, model: Path | None, server: str | None, preprocess: Path | None, *, tls: TlsSettings | None
) -> Iterator[Predictor]:
    if server is not None:
        from groundglass_client.connection import connect

        with connect(server, tls=tls) as transport:
            yield ServedModel(transport, server)
        return
    with extra("export"):
        from groundglass_export.evaluation.local import open_checkpoint, open_model

        opened = open_checkpoint(checkpoint) if checkpoint is not None else None
    if opened is None and model is not None:
        opened = open_model(model, preprocess)
    if opened is not None:
        yield opened


def _require_one_way(*ways: Path | str | None) -> None:
    named = [flag for flag, value in zip(_WAYS, ways, strict=True) if value is not None]
    if len(named) != 1:
        found = " and ".join(named) or "none"
        raise SettingError(f"{found} given: name one model to evaluate, by {', '.join(_WAYS[:-1])} or {_WAYS[-1]}")


def _require_writable(json_file: str | None) -> None:
    """Before the slices: an evaluation takes minutes."""
    if json_file is None or json_file == "-":
        return
    path = Path(json_file)
    if path.is_dir():
        raise SettingError(f"--json {path} is a folder; name a file, or - for stdout")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"--json {path} can't be written: {error}") from error


def _print(report: EvaluationReport | PooledReport, json_file: str | None) -> None:
    content = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
    if json_file == "-":
        print(content, end="")
        return
    print(report.as_text())
    if json_file is None:
        return
    try:
        with published(Path(json_file)) as beside:
            beside.write_text(content, encoding="utf-8")
    except OSError as error:
        raise SettingError(f"--json {json_file} was not written: {error}") from error
