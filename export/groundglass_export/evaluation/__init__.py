"""Evaluation: a model against a labelled set, as the paper's tables; the same whether it is a file or a live server.

``read_labelled_set`` reads what is to be compared with what, ``opened_set`` opens the slices and their labels,
``evaluate`` asks a :class:`Predictor` and counts, ``build_report`` makes the tables. No torch and no client is needed
here: who decodes slices and who answers are arguments.
"""

from groundglass_export.evaluation.evaluate import Evaluation, evaluate
from groundglass_export.evaluation.labelled_set import LabelledSet, read_labelled_set
from groundglass_export.evaluation.opening import Intake, LabelledScan, LabelledSource, opened_set, slice_total
from groundglass_export.evaluation.pooling import PooledReport, pool_reports
from groundglass_export.evaluation.prediction import ModelIdentity, Predictions, Predictor
from groundglass_export.evaluation.report import EvaluationReport, build_report

__all__ = [
    "Evaluation",
    "EvaluationReport",
    "Intake",
    "LabelledScan",
    "LabelledSet",
    "LabelledSource",
    "ModelIdentity",
    "PooledReport",
    "Predictions",
    "Predictor",
    "build_report",
    "evaluate",
    "opened_set",
    "pool_reports",
    "read_labelled_set",
    "slice_total",
]
