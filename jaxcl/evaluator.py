"""Scores of every task so far, by whatever measures its kind."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcl.components import Components, ProcessShare, rooted
from jaxcl.data.pairs import encode_prompts
from jaxcl.data.pipeline import LabelledPipeline
from jaxcl.data.sources import TaskData, load_end_task
from jaxcl.evaluation.end_tasks import score_end_task
from jaxcl.evaluation.metrics import find_metric
from jaxcl.evaluation.scoring import score_pairs, text_loss
from jaxcl.methods.base import Method
from jaxcl.models.batch import Batch
from jaxcl.models.generation import Generator
from jaxcl.training.feed import place_batch
from jaxcl.training.state import TrainState

Params = Any


class Evaluation(NamedTuple):
    """What one model achieves on one task.

    Attributes:
      score: by the task's metric.
      further: by other measures of the same task, by name.
      rows: one an example, for `predictions/`.
    """

    score: float
    further: dict[str, float]
    rows: list[dict[str, Any]]


class Evaluator:
    """Scores params on the tasks of a run; what is compiled or encoded is kept for the next time."""

    def __init__(self, parts: Components) -> None:
        self.parts = parts
        self.settings = parts.config.evaluation
        self._texts: dict[int, ProcessShare] = {}
        self._end_tasks: dict[int, tuple[TaskData, dict[str, LabelledPipeline]]] = {}

    @functools.cached_property
    def metrics(self) -> list[str]:
        """The metric of each task."""
        specs = self.parts.config.tasks
        return [
            self.settings.metric_for(task.kind, spec.metric) for task, spec in zip(self.parts.tasks, specs, strict=True)
        ]

    @property
    def higher_is_better(self) -> list[bool]:
        """The direction of each task's metric."""
        return [find_metric(name).higher_is_better for name in self.metrics]

    def score(self, params: Params, index: int) -> Evaluation:
        """Scores one task.

        Args:
          params: of the run's network, sharded as in training.
          index: which task.
        """
        if self.parts.tasks[index].kind == "pairs":
            return self._score_pairs(params, index)
        return self._score_text(params, index)

    def _score_pairs(self, params: Params, index: int) -> Evaluation:
        scored = score_pairs(
            getattr(self.parts.tasks[index], self.settings.split),
            functools.partial(self._answer, params),
            self.metrics[index],
            batch_size=self.settings.batch_size,
            limit=self.settings.limit,
        )
        return Evaluation(scored.score, {}, scored.rows)

    @functools.cached_property
    def _generator(self) -> Generator:
        tokenizer, data = self.parts.tokenizer, self.parts.config.data
        return Generator(
            self.parts.network,
            batch_size=self.settings.batch_size,
            prompt_length=data.prompt_length,
            max_new_tokens=self.settings.max_new_tokens,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )

    def _answer(self, params: Params, prompts: list[str]) -> list[str]:
        ids = encode_prompts(prompts, self.parts.tokenizer, self.parts.config.data).ids
        return [self.parts.tokenizer.decode(answer).strip() for answer in self._generator(params, ids)]

    def _score_text(self, params: Params, index: int) -> Evaluation:
        if index not in self._texts:
            rows = self.parts.encode(index, self.settings.split)
            self._texts[index] = ProcessShare(self.parts.pipeline([rows], batch_size=self.settings.batch_size))
        # The seed of the masking is fixed: every model predicts the same tokens.
        batches = map(self._place, self._texts[index].once(self.settings.limit, 0))
        loss = text_loss(self.parts.network, params, batches, compile=self.parts.trainer.compile)
        scores = {"perplexity": loss.perplexity, "token_accuracy": loss.token_accuracy}
        score = scores.pop(self.metrics[index])
        return Evaluation(score, scores | self._score_end_task(params, index), [])

    def _score_end_task(self, params: Params, index: int) -> dict[str, float]:
        spec = self.parts.config.tasks[index].end_task
        if spec is None:
            return {}
        task, splits = self._end_task(index)
        scores = score_end_task(
            self.parts.network,
            params,
            splits["train"],
            splits[self.settings.split],
            dev=splits.get("dev"),
            num_labels=len(task.labels),
            config=self.settings.end_task,
            seed=self.parts.config.seed,
            compile=self.parts.trainer.compile,
            place=self._place,
        )
        metric = self.settings.metric_for("labelled", spec.metric)
        return {f"end task {metric}": scores.metric(metric), "end task accuracy": scores.accuracy}

    def _end_task(self, index: int) -> tuple[TaskData, dict[str, LabelledPipeline]]:
        if index not in self._end_tasks:
            spec = self.parts.config.tasks[index].end_task
            assert spec is not None
            task = load_end_task(rooted(spec, self.parts.config.data_root), self.parts.config.tasks[index].name)
            data = self.parts.config.data.model_copy(update={"length": self.settings.end_task.length})
            self._end_tasks[index] = (
                task,
                {
                    split: LabelledPipeline(
                        getattr(task, split),
                        task.labels,
                        self.parts.tokenizer,
                        data,
                        masked=not self.parts.network.causal,
                        batch_size=self.settings.end_task.batch_size,
                        name=task.name,
                    )
                    for split in ("train", "dev", "test")
                    if getattr(task, split)
                },
            )
        return self._end_tasks[index]

    def _place(self, rows: Mapping[str, Any]) -> Batch:
        return place_batch(dict(rows), self.parts.layout.batch)


def scored_tasks(parts: Components, after: int) -> Iterator[int]:
    """Indices of the tasks to score after task `after` (-1: before any training)."""
    if parts.method.individual and after >= 0:
        yield after  # the models of the tasks before are as they were, those of the tasks to come do not exist yet
        return
    learned = len(parts.tasks) if parts.method.joint and after >= 0 else after + 1
    yield from parts.config.evaluation.tasks_after(learned, len(parts.tasks))


def answering_params(parts: Components, state: TrainState, index: int) -> Params:
    """The params that answer task `index`; see `Method.params_for`."""
    if type(parts.method).params_for is Method.params_for:
        return state.params  # compiled, even the identity would copy them
    return parts.trainer.compile(parts.method.params_for)(state.params, state.method_state, jnp.int32(index))
