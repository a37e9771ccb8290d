"""What is measured after each task: task metrics, end tasks, and the results of a run."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcl.evaluation.config import EndTaskConfig, EvaluationConfig
    from jaxcl.evaluation.end_tasks import EndTaskScore, score_end_task
    from jaxcl.evaluation.harness import HarnessModel
    from jaxcl.evaluation.metrics import METRICS, Metric, find_metric
    from jaxcl.evaluation.results import Measure, Results, measure
    from jaxcl.evaluation.scoring import Scored, TextLoss, score_pairs, text_loss

__all__ = [
    "METRICS",
    "EndTaskConfig",
    "EndTaskScore",
    "EvaluationConfig",
    "HarnessModel",
    "Measure",
    "Metric",
    "Results",
    "Scored",
    "TextLoss",
    "find_metric",
    "measure",
    "score_end_task",
    "score_pairs",
    "text_loss",
]
