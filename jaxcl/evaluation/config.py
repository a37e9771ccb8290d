"""The `evaluation` section of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from jaxcl.errors import UserError
from jaxcl.evaluation.metrics import Kind, find_metric
from jaxcl.schema import Schema


class EndTaskConfig(Schema):
    """How a copy of the model is fine-tuned on the labelled task that belongs to a domain."""

    epochs: int = Field(10, ge=1, description="most passes over the training examples")
    batch_size: int = Field(16, ge=1, description="examples a step")
    learning_rate: float = Field(3e-5, gt=0, description="peak learning rate of AdamW")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of all steps over which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decay of matrices; biases and scales have none")
    clip: float = Field(1.0, gt=0, description="largest norm of a gradient")
    patience: int = Field(3, ge=1, description="passes without a better dev score after which to stop")
    seeds: int = Field(1, ge=1, description="repetitions whose scores are averaged")
    length: int = Field(128, ge=8, description="tokens of an example; longer ones are cut")


_KIND_OF: dict[str, Kind] = {"pairs_metric": "pairs", "text_metric": "text", "labelled_metric": "labelled"}


class EvaluationConfig(Schema):
    """What is measured after each task, and how."""

    split: Literal["test", "dev"] = Field("test", description="the examples that are scored")
    limit: int | None = Field(None, ge=1, description="score at most so many examples of a task, the same in every run")
    batch_size: int = Field(32, ge=1, description="examples generated or scored at once")
    max_new_tokens: int = Field(64, ge=1, description="longest answer, in tokens")
    before: bool = Field(False, description="also score every task before any training (needed for FWT)")
    future: Literal["none", "next", "all"] = Field(
        "none", description="also score tasks not learned yet: none, the next one (needed for FWT), or all"
    )
    pairs_metric: str = Field("exact_match", description="metric of instruction tasks that name none")
    text_metric: str = Field("perplexity", description="metric of text domains that name none")
    end_tasks: Literal["each", "last"] = Field(
        "each",
        description="when end tasks are scored; each: whenever their domain is; last: before any training, right after "
        "their domain was learned and after the last one, which is all that OP, BWT and the forgetting rate need",
    )
    labelled_metric: str = Field("macro_f1", description="metric of end tasks that name none")
    end_task: EndTaskConfig = Field(EndTaskConfig(), description="fine-tuning on a domain's labelled task")

    @field_validator("pairs_metric", "text_metric", "labelled_metric")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        return check_metric(name, _KIND_OF[info.field_name or ""])

    def metric_for(self, kind: Kind, name: str | None = None) -> str:
        """The metric of a task of that kind: the one it names, else this section's.

        Args:
          kind: the kind of the task.
          name: the metric that the task names.

        Raises:
          UserError: it names none that exists or that scores such tasks.
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
    """For configuration fields: the name, or a `ValueError` (which pydantic reports) that lists the valid ones."""
    try:
        return find_metric(name, kind).name
    except UserError as error:
        raise ValueError(str(error)) from None
