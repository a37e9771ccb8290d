"""What a run notes of its domains' end tasks, with scores that are given instead of measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxcl.config import parse_config
from jaxcl.errors import UserError
from jaxcl.evaluation.end_tasks import EndTaskScore
from jaxcl.evaluation.results import Results
from jaxcl.reporting.report import write_report
from jaxcl.run import evaluator, sequence
from tests.tiny.runs import ENCODER, TOKENIZER

TEXT: dict[str, Any] = {
    "model": {**ENCODER, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1},
    "tokenizer": TOKENIZER,
    "data": {"length": 48, "packing": False},
    "tasks": [
        {"name": name, "source": source, "train": 16, "test": 8, "end_task": {"source": labels, "test": 8, **metric}}
        for name, source, labels, metric in (
            ("topics", "stdlib:python_topics", "stdlib:python_topic_names", {}),
            ("pydantic", "stdlib:docstrings:pydantic", "stdlib:submodules:pydantic", {"metric": "micro_f1"}),
            ("numpy", "stdlib:docstrings:numpy", "stdlib:submodules:numpy", {}),
        )
    ],
    "training": {"batch_size": 8, "steps": 1},
    "evaluation": {"batch_size": 8, "before": True},
    "method": "sequential",
}


class Given:
    """Stands for fine-tuning: every call gives two repetitions around the next number; accuracy is 10 more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.metrics: list[str] = []
        monkeypatch.setattr(evaluator, "score_end_task", self)

    def __call__(self, *arguments: Any, **options: Any) -> EndTaskScore:
        self.calls += 1
        self.metrics.append(options["metric"])
        runs = [
            {"macro_f1": self.calls + by, "micro_f1": 50.0 + self.calls + by, "accuracy": 10.0 + self.calls}
            for by in (-1.0, 1.0)
        ]
        means = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        none = np.zeros(0, np.int32)
        return EndTaskScore(**means, runs=runs, predictions=none, labels=none, seconds=0.0)


def run(folder: Path, tasks: list[dict[str, Any]] = TEXT["tasks"], **evaluation: Any) -> Results:
    content = {**TEXT, "output": str(folder), "tasks": tasks, "evaluation": {**TEXT["evaluation"], **evaluation}}
    return sequence.run(parse_config(content)).results


@pytest.mark.slow
def test_end_tasks_as_the_metric_measured_only_where_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given(monkeypatch)
    results = run(tmp_path / "run", text_metric="end_task", end_tasks="last")
    # Before, after each its own, and all at the end: 3 + 1 + 1 + 3. The second domain's metric is 50 higher.
    assert given.calls == 8
    assert given.metrics == [
        f"{name}_f1" for name in ("macro", "micro", "macro", "macro", "micro", "macro", "micro", "macro")
    ]
    assert results.metric == ["end task macro_f1", "end task micro_f1", "end task macro_f1"]
    assert results.higher_is_better == [True] * 3
    assert results.initial == [1.0, 52.0, 3.0]
    assert results.matrix == [[4.0, None, None], [None, 55.0, None], [6.0, 57.0, 8.0]]
    spread = pytest.approx(2**0.5)  # of two repetitions that differ by 2
    assert results.initial_deviation == [spread] * 3
    assert results.deviation == [[spread, None, None], [None, spread, None], [spread] * 3]
    assert results.op == pytest.approx((6 + 57 + 8) / 3)
    assert results.bwt == pytest.approx(((6 - 4) + (57 - 55)) / 2)
    assert results.forgetting_rate == pytest.approx(-2)
    assert results.gain == pytest.approx(((6 - 1) + (57 - 52) + (8 - 3)) / 3)
    assert results.forgetting is None  # it would need what lies between
    # Perplexity is cheap and measured everywhere; accuracy comes with the end tasks.
    assert results.further.keys() == {"perplexity", "token_accuracy", "end task accuracy"}
    assert [[score is None for score in row] for row in results.further["perplexity"].matrix] == [
        [False, True, True], [False, False, True], [False, False, False],
    ]  # fmt: skip
    assert None not in (results.further["perplexity"].initial or [None])
    assert results.further["perplexity"].gain is not None
    assert results.further["end task accuracy"].matrix[2] == [16.0, 17.0, 18.0]
    assert results.further["end task accuracy"].deviation == [[0.0, None, None], [None, 0.0, None], [0.0] * 3]
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "57.0 <small>± 1.4</small>" in page
    assert "Gain" in page


@pytest.mark.slow
def test_end_tasks_beside_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End tasks of different metrics are one measure; a domain without one leaves a gap."""
    given = Given(monkeypatch)
    tasks = [{key: value for key, value in TEXT["tasks"][0].items() if key != "end_task"}, *TEXT["tasks"][1:]]
    results = run(tmp_path / "run", tasks, before=False)
    assert given.calls == 3
    assert results.metric == ["perplexity"] * 3
    assert (results.initial, results.gain, results.deviation) == (None, None, None)
    measured = results.further["end task"]
    assert measured.metric == ["end task macro_f1", "end task micro_f1", "end task macro_f1"]
    assert measured.matrix == [[None] * 3, [None, 51.0, None], [None, 52.0, 3.0]]
    assert measured.op is None


def test_a_domain_without_the_end_task_that_is_its_metric_is_refused(tmp_path: Path) -> None:
    tasks = [{**TEXT["tasks"][0], "metric": "end_task", "end_task": None}]
    with pytest.raises(UserError, match="task topics: its metric is end_task, but it has none") as caught:
        run(tmp_path / "run", tasks)
    assert caught.value.exit_code == 2
