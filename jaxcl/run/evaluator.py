"""Scores of the tasks of a run, with the metrics of their kinds."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp

from jaxcl.data.chat_rows import encode_openings
from jaxcl.data.images.reference import has_images, shown
from jaxcl.data.images.thumbnails import image_keys
from jaxcl.data.pairs import EncodedPrompts, encode_answers, encode_prompts
from jaxcl.data.pipeline import LabelledPipeline
from jaxcl.data.rows import HostBatch
from jaxcl.data.sources import TaskData
from jaxcl.errors import UserError
from jaxcl.evaluation.end_tasks import score_end_task
from jaxcl.evaluation.metrics import find_metric
from jaxcl.evaluation.scoring import drawn, score_pairs, text_loss
from jaxcl.methods.base import Method
from jaxcl.models.batch import Batch
from jaxcl.models.generation import Generator
from jaxcl.models.trainable import Params
from jaxcl.run.checks import longest_prefix
from jaxcl.run.components import Components, ProcessShare
from jaxcl.sharding.processes import is_first
from jaxcl.training.feed import place_batch
from jaxcl.training.loops import Loops
from jaxcl.training.state import TrainState

_END_TASK = "end task"


class Score(NamedTuple):
    """A number, and its standard deviation if it is a mean of several measurements."""

    value: float
    deviation: float | None = None


class Evaluation(NamedTuple):
    """Scores of one model on one task.

    Attributes:
      score: of the task's metric; `None` if that is an end task that is not due.
      further: other measures of the same task, by name.
      rows: one per example, for `predictions/`; `images` are the names of those that its prompt has.
      images: the files of these images by name.
    """

    score: Score | None
    further: dict[str, Score]
    rows: list[dict[str, Any]]
    images: Mapping[str, bytes] = {}


class Evaluator:
    """Scores params on the tasks of a run; keeps compiled functions and encoded data.

    Attributes:
      loops: those over what is scored.
    """

    def __init__(self, parts: Components) -> None:
        self.parts = parts
        self.loops = Loops()
        self.settings = parts.config.evaluation
        self._rows: dict[tuple[int, str], list[dict[str, str]]] = {}
        self._texts: dict[tuple[int, str], ProcessShare] = {}
        self._end_tasks: dict[int, tuple[TaskData, dict[str, ProcessShare]]] = {}

    @functools.cached_property
    def metrics(self) -> list[str]:
        """The metric of each task; `end task X` is metric X of the domain's end task.

        Raises:
          UserError: a domain's metric is end_task, but it has no end task.
        """
        return [self._metric(index) for index in range(len(self.parts.tasks))]

    def _metric(self, index: int) -> str:
        task, spec = self.parts.tasks[index], self.parts.config.tasks[index]
        name = self.settings.metric_for("pairs" if task.answered else "text", spec.metric)
        if name != "end_task":
            return name
        if spec.end_task is None:
            raise UserError(
                f"task {task.name}: its metric is end_task, but it has none; add an end_task section or choose another "
                "metric",
                exit_code=2,
            )
        return self._end_task_metric(index)

    def _end_task_metric(self, index: int) -> str:
        spec = self.parts.config.tasks[index].end_task
        return f"{_END_TASK} {self.settings.metric_for('labelled', spec.metric if spec else None)}"

    @functools.cached_property
    def _end_task_measure(self) -> str:
        """Name of the measure of all end tasks: that of their metric, if they share one."""
        tasks = self.parts.config.tasks
        names = {self._end_task_metric(index) for index, task in enumerate(tasks) if task.end_task is not None}
        return names.pop() if len(names) == 1 else _END_TASK

    def further_metrics(self, name: str) -> list[str]:
        """The metric of each task in the further measure `name`."""
        count = len(self.parts.tasks)
        return [self._end_task_metric(index) for index in range(count)] if name == _END_TASK else [name] * count

    def check(self) -> None:
        """Checks before the training that all tasks can be evaluated; process 0 prints what is only partly possible.

        Raises:
          UserError: a task has no rows in the split, a metric does not fit, or answers are longer than those generated
            while the metric scores whole answers only.
        """
        assert len(self.metrics) == len(self.parts.tasks)
        for index, task in enumerate(self.parts.tasks):
            if not self.parts.config.tasks[index].data_gone:
                self._check_split(task, f"task {task.name}")
                if task.answered:
                    self._check_answers(index)
                    self._check_prompts(index)
        for index, task in self.parts.end_tasks.items():
            self._check_split(task, f"end task of {self.parts.names[index]}")
            assert self._end_task_metric(index)
        self._say_mixed()

    def _say_mixed(self) -> None:
        """Says that there is no mean score if a lower one is better for some of the tasks only."""
        lower = [task.name for task, up in zip(self.parts.tasks, higher_is_better(self.metrics), strict=True) if not up]
        if is_first() and 0 < len(lower) < len(self.parts.tasks):
            print(
                f"no mean score of all tasks (OP): a lower one is better for {', '.join(lower)}, a higher one for the "
                "others; choose metrics of one direction to have it",
                file=sys.stderr,
            )

    def _check_split(self, task: TaskData, words: str) -> None:
        split = self.settings.split
        if not getattr(task, split):
            held = [other for other in ("test", "dev") if getattr(task, other)]
            raise UserError(
                f"{words}: no {split} rows in {task.where.get(split, 'its source')}, but evaluation.split is {split}; "
                f"it has: {', '.join(held)}",
                exit_code=2,
            )

    def _check_answers(self, index: int) -> None:
        """Compares the lengths of a task's answers with `max_new_tokens`."""
        task, metric, settings = self.parts.tasks[index], self.metrics[index], self.settings
        of_beginning = find_metric(metric).of_beginning
        if of_beginning == "all":
            return
        chosen = self._pairs(index, self.settings.split)
        answers, prompts = ([row[name] for row in chosen] for name in ("answer", "prompt"))
        if task.kind == "chat":
            encoded = self.parts.tokenizer.encode_batch(answers, continued=True)
        else:
            encoded = encode_answers(answers, prompts, self.parts.tokenizer, self.parts.config.data)
        long = [len(tokens) for tokens in encoded if len(tokens) > settings.max_new_tokens]
        if not long:
            return
        line = (
            f"task {task.name}: evaluation.max_new_tokens is {settings.max_new_tokens}, but {len(long)} of "
            f"{len(chosen)} {settings.split} answers are longer"
        )
        if of_beginning == "nothing":
            raise UserError(f"{line} and can never be right by {metric}; {max(long)} is needed", exit_code=2)
        if is_first():
            print(f"{line}; {metric} scores what is generated of them, {max(long)} would be enough", file=sys.stderr)

    def _check_prompts(self, index: int) -> None:
        """Encodes the prompts of which some may be refused: conversations, and what holds images."""
        task, split = self.parts.tasks[index], self.settings.split
        prompts = [row["prompt"] for row in self._pairs(index, split)]
        if task.kind == "chat" or any(map(has_images, prompts)):
            size = self.settings.batch_size  # tiles of all images would be much
            for start in range(0, len(prompts), size):
                self._encoded(index, prompts[start : start + size], f"task {task.name}: scored {split} row", start)

    def score(self, params: Params, index: int, after: int) -> Evaluation:
        """Scores one task.

        Args:
          params: params of the run's network, sharded as in training.
          index: which task.
          after: index of the task learned last; -1 before any training.
        """
        if self.parts.tasks[index].answered:
            return self._score_pairs(params, index, self.settings.split)
        scores = self._text_scores(params, index, self.settings.split)
        if self.settings.end_task_due(after, index, self.parts.phases - 1):
            scores |= self._score_end_task(params, index)
        metric = self.metrics[index]
        own = self._end_task_measure if metric.startswith(_END_TASK) else metric
        return Evaluation(scores.pop(own, None), scores, [])

    def score_dev(self, params: Params, index: int) -> float | None:
        """Score of a task on its dev rows; `None` if it has none, or if its metric is that of an end task.

        Args:
          params: see `score`.
          index: which task.
        """
        task, metric = self.parts.tasks[index], self.metrics[index]
        if not task.dev or metric.startswith(_END_TASK):
            return None
        if task.answered:
            score = self._score_pairs(params, index, "dev").score
            return None if score is None else score.value
        return self._text_scores(params, index, "dev")[metric].value

    def _score_pairs(self, params: Params, index: int, split: str) -> Evaluation:
        scored = score_pairs(
            self._pairs(index, split),
            functools.partial(self._answer, params, index),
            self.metrics[index],
            batch_size=self.settings.batch_size,
            each=self.loops.each,
        )
        rows: list[dict[str, Any]] = []
        images: dict[str, bytes] = {}
        for row in scored.rows:
            found = image_keys(row["prompt"])
            images.update(found)
            names = {"images": [name for name, _ in found]} if found else {}
            rows.append({**row, "prompt": shown(row["prompt"]), **names})
        return Evaluation(Score(scored.score), {}, rows, images)

    def _pairs(self, index: int, split: str) -> list[dict[str, str]]:
        """The rows of a task that are scored, which are read once."""
        if (index, split) not in self._rows:
            rows = getattr(self.parts.tasks[index], split)
            self._rows[index, split] = rows.pick(drawn(len(rows), self.settings.limit))
        return self._rows[index, split]

    @functools.cached_property
    def _generator(self) -> Generator:
        tokenizer, data = self.parts.tokenizer, self.parts.config.data
        return Generator(
            self.parts.network,
            batch_size=self.settings.batch_size,
            prompt_length=data.prompt_length + longest_prefix(self.parts.method),
            max_new_tokens=self.settings.max_new_tokens,
            eos_id=tokenizer.end_ids,
            pad_id=tokenizer.pad_id,
            trace=self.parts.trainer.compile.trace,
        )

    def _answer(self, params: Params, index: int, prompts: list[str]) -> list[str]:
        prefix = self.parts.method.prompt_prefix(index)
        encoded = self._encoded(index, prompts)
        ids = [[*prefix, *row] for row in encoded.ids]
        answers = self._generator(params, ids, images=encoded.pixels)
        texts = [self.parts.tokenizer.decode(answer).strip() for answer in answers]
        # What a model thinks before it answers is not the answer.
        chat = self.parts.tasks[index].kind == "chat"
        return [text.rpartition("</think>")[2].strip() for text in texts] if chat else texts

    def _encoded(self, index: int, prompts: list[str], words: str = "prompt", before: int = 0) -> EncodedPrompts:
        """Prompts of a task as token ids; messages call them by `words` and their number, after those `before`."""
        encode = encode_openings if self.parts.tasks[index].kind == "chat" else encode_prompts
        names = [f"{words} {before + number}" for number in range(1, len(prompts) + 1)]
        return encode(prompts, self.parts.tokenizer, self.parts.config.data, names.__getitem__)

    def _text_scores(self, params: Params, index: int, split: str) -> dict[str, Score]:
        if (index, split) not in self._texts:
            rows = self.parts.encode(index, split)
            self._texts[index, split] = ProcessShare(self.parts.pipeline([rows], batch_size=self.settings.batch_size))
        # The masking has a fixed seed, so that every model predicts the same tokens.
        batches = self._texts[index, split].once(self.settings.limit, 0)
        compile, each = self.parts.trainer.compile, self.loops.each
        loss = text_loss(self.parts.network, params, batches, compile=compile, place=self._place, each=each)
        return {"perplexity": Score(loss.perplexity), "token_accuracy": Score(loss.token_accuracy)}

    def _score_end_task(self, params: Params, index: int) -> dict[str, Score]:
        spec = self.parts.config.tasks[index].end_task
        if spec is None:
            return {}
        task, splits = self._end_task(index)
        metric = self.settings.metric_for("labelled", spec.metric)
        scores = score_end_task(
            self.parts.network,
            params,
            splits["train"],
            splits[self.settings.split],
            dev=splits.get("dev"),
            num_labels=len(task.labels),
            metric=metric,
            config=self.settings.end_task,
            seed=self.parts.config.seed,
            compile=self.parts.trainer.compile,
            place=self._place_or_stop,
            each=self.loops.each,
        )
        return {
            name: Score(scores.metric(one), scores.deviation(one))
            for name, one in ((f"{_END_TASK} accuracy", "accuracy"), (self._end_task_measure, metric))
        }

    def _end_task(self, index: int) -> tuple[TaskData, dict[str, ProcessShare]]:
        if index not in self._end_tasks:
            task = self.parts.end_tasks[index]
            data = self.parts.config.data.model_copy(update={"length": self.settings.end_task.length})
            self._end_tasks[index] = (
                task,
                {
                    split: ProcessShare(
                        LabelledPipeline(
                            getattr(task, split),
                            task.labels,
                            self.parts.tokenizer,
                            data,
                            masked=not self.parts.network.causal,
                            batch_size=self.settings.end_task.batch_size,
                            name=task.name,
                            token_types=self.parts.network.num_token_types,
                        )
                    )
                    for split in ("train", "dev", "test")
                    if getattr(task, split)
                },
            )
        return self._end_tasks[index]

    def _place(self, rows: Mapping[str, Any]) -> Batch:
        return place_batch(cast(HostBatch, rows), self.parts.layout.batch)

    def _place_or_stop(self, rows: Mapping[str, Any]) -> Batch:
        self.loops.check()
        return self._place(rows)


def higher_is_better(metrics: Sequence[str]) -> list[bool]:
    """Whether larger is better, for metrics by their names in results."""
    return [find_metric(name.removeprefix(f"{_END_TASK} ")).higher_is_better for name in metrics]


def scored_tasks(parts: Components, after: int) -> Iterator[int]:
    """Indices of the tasks to score after task `after` (-1: before any training)."""
    tasks = parts.config.tasks
    learned = len(tasks) if parts.method.joint and after >= 0 else after + 1
    due: Sequence[int] = parts.config.evaluation.tasks_after(learned, len(tasks))
    if parts.method.individual and after >= 0:
        due = [after]  # earlier models have not changed, later ones do not exist yet
    yield from (index for index in due if not tasks[index].data_gone)


def answering_params(parts: Components, state: TrainState, index: int) -> Params:
    """The params for task `index`; see `Method.params_for`."""
    if type(parts.method).params_for is Method.params_for:
        return state.params  # a compiled identity would copy them
    return parts.trainer.compile(parts.method.params_for)(state.params, state.method_state, jnp.int32(index))
