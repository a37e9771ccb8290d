"""The `evaluation` section of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from jaxcl.errors import UserError
from jaxcl.evaluation.metrics import Kind, find_metric
from jaxcl.schema import Schema


class EndTaskConfig(Schema):
    """How a copy of the model is fine-tuned on a domain's labelled task."""

    epochs: int = Field(10, ge=1, description="maximal number of passes over the training examples")
    batch_size: int = Field(16, ge=1, description="examples per step")
    learning_rate: float = Field(3e-5, gt=0, description="peak learning rate of AdamW")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of all steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decay of matrices, not of biases and scales")
    clip: float = Field(1.0, gt=0, description="maximal norm of a gradient")
    patience: int = Field(3, ge=1, description="stop after this number of passes without a better dev score")
    seeds: int = Field(1, ge=1, description="number of repetitions; scores are averaged")
    length: int = Field(128, ge=8, description="tokens per example; longer ones are cut")


_KIND_OF: dict[str, Kind] = {"pairs_metric": "pairs", "text_metric": "text", "labelled_metric": "labelled"}


class EvaluationConfig(Schema):
    """What is measured after each task, and how."""

    split: Literal["test", "dev"] = Field("test", description="split of the scored examples")
    dev: bool = Field(
        False,
        description="also score the dev rows of all tasks after the last one (`dev` in results.json), to choose "
        "settings by; `jaxcl compare --sweep` does",
    )
    limit: int | None = Field(
        None, ge=1, description="maximal number of scored examples per task; the same ones in every run"
    )
    batch_size: int = Field(32, ge=1, description="examples generated or scored at once")
    max_new_tokens: int = Field(64, ge=1, description="maximal length of an answer, in tokens")
    before: bool = Field(False, description="also score every task before any training (needed for FWT)")
    future: Literal["none", "next", "all"] = Field(
        "none", description="also score tasks that are not learned yet: none, the next one (needed for FWT), or all"
    )
    pairs_metric: str = Field("exact_match", description="default metric of instruction tasks")
    text_metric: str = Field("perplexity", description="default metric of text domains")
    end_tasks: Literal["each", "last"] = Field(
        "each",
        description="when end tasks are scored; each: whenever their domain is; last: only before any training, right "
        "after their domain and after the last one, which suffices for OP, BWT and the forgetting rate",
    )
    labelled_metric: str = Field("macro_f1", description="default metric of end tasks")
    end_task: EndTaskConfig = Field(EndTaskConfig(), description="fine-tuning on a domain's labelled task")

    @field_validator("pairs_metric", "text_metric", "labelled_metric")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        return check_metric(name, _KIND_OF[info.field_name or ""])

    def metric_for(self, kind: Kind, name: str | None = None) -> str:
        """The metric of a task of that kind: `name`, or this section's default.

        Args:
          kind: the kind of the task.
          name: the metric that the task names.

        Raises:
          UserError: the metric does not exist or cannot score such tasks.
        """
        default = {"pairs": self.pairs_metric, "text": self.text_metric, "labelled": self.labelled_metric}[kind]
        return find_metric(name or default, kind).name

    def end_task_due(self, after: int, index: int, last: int) -> bool:
        """Whether the end task of domain `index` is scored after task `after` (-1: before any training).

        Args:
          after: index of the task learned last.
          index: index of the domain.
          last: index of the last task of the run.
        """
        return self.end_tasks == "each" or after in (-1, index, last)

    def tasks_after(self, learned: int, num_tasks: int) -> range:
        """Indices of the tasks to score when the first `learned` tasks have been learned; 0: before any training.

        Args:
          learned: number of tasks learned so far; 0: before any training.
          num_tasks: number of tasks of the run.
        """
        if learned == 0:
            return range(num_tasks if self.before else 0)
        end = {"none": learned, "next": learned + 1, "all": num_tasks}[self.future]
        return range(min(end, num_tasks))


def check_metric(name: str, kind: Kind | None = None) -> str:
    """For configuration fields: the name, or a `ValueError` (which pydantic reports) that lists the valid names."""
    try:
        return find_metric(name, kind).name
    except UserError as error:
        raise ValueError(str(error)) from None
