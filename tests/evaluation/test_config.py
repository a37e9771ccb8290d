import pytest
from pydantic import ValidationError

from jaxcl.errors import UserError
from jaxcl.evaluation.config import EvaluationConfig


@pytest.mark.parametrize(
    ("future", "before", "learned", "expected"),
    [
        ("none", False, 0, []),
        ("none", True, 0, [0, 1, 2]),
        ("none", True, 2, [0, 1]),
        ("next", False, 2, [0, 1, 2]),
        ("next", False, 3, [0, 1, 2]),
        ("all", False, 1, [0, 1, 2]),
    ],
)
def test_which_tasks_are_scored(future: str, before: bool, learned: int, expected: list[int]) -> None:
    config = EvaluationConfig.model_validate({"future": future, "before": before})
    assert list(config.tasks_after(learned, 3)) == expected


def test_metric_of_a_task_is_its_own_or_that_of_its_kind() -> None:
    config = EvaluationConfig(pairs_metric="rouge_l")
    assert config.metric_for("pairs") == "rouge_l"
    assert config.metric_for("pairs", "sari") == "sari"
    assert config.metric_for("text") == "perplexity"
    with pytest.raises(UserError, match="does not score text tasks"):
        config.metric_for("text", "rouge_l")


def test_a_misspelt_metric_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValidationError, match="did you mean exact_match"):
        EvaluationConfig(pairs_metric="exact-match")
    with pytest.raises(ValidationError, match="does not score labelled tasks"):
        EvaluationConfig(labelled_metric="perplexity")


@pytest.mark.parametrize(
    ("end_tasks", "after", "expected"),
    [
        ("each", 1, [True, True, True]),
        ("last", -1, [True, True, True]),
        ("last", 0, [True, False, False]),
        ("last", 1, [False, True, False]),
        ("last", 2, [True, True, True]),
    ],
)
def test_when_end_tasks_are_scored(end_tasks: str, after: int, expected: list[bool]) -> None:
    config = EvaluationConfig.model_validate({"end_tasks": end_tasks})
    assert [config.end_task_due(after, index, last=2) for index in range(3)] == expected
