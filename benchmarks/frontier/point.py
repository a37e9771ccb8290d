"""One point of the frontier: a method with one setting and one seed, run in process; points share compiled programs.

The run is that of `jaxcl run` (`jaxcl.run.sequence.TaskSequence`), with three differences that make it cheap: the
learning rate is a traced value, so that all learning rates and seeds of a setting share one compiled step; what the run
would read again from checkpoints is kept in memory; and only what is reported is scored.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from benchmarks.frontier.records import Point
from benchmarks.frontier.testbeds import GENERAL_ROWS, SPLIT_OF, TESTBEDS, general_text
from jaxcl.config import parse_config
from jaxcl.data.pairs import encode_answers
from jaxcl.data.pipeline import Pipeline
from jaxcl.data.sources import load_task
from jaxcl.data.spec import DataConfig, TaskSpec
from jaxcl.data.text import TextRows
from jaxcl.evaluation.scoring import text_loss
from jaxcl.functional.distillation import full_divergence
from jaxcl.functional.losses import scored_states
from jaxcl.functional.matrix import ContinualMatrix
from jaxcl.methods.base import Method, OptimizerParts
from jaxcl.methods.registry import find_method
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network
from jaxcl.models.trainable import Params
from jaxcl.run.components import Components, build, initial_params
from jaxcl.run.evaluator import answering_params, scored_tasks
from jaxcl.run.folder import RunFolder
from jaxcl.run.sequence import TaskSequence
from jaxcl.sharding.layout import put
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.feed import place_batch
from jaxcl.training.keys import run_key
from jaxcl.training.state import TrainState
from jaxcl.training.trainer import Trainer


class RateState(NamedTuple):
    """An optimizer's state, and what its learning rate is multiplied by."""

    rate: Array
    inner: Any


def with_rate(method: type[Method]) -> type[Method]:
    """The method, with a factor on its learning rate in the optimizer's state."""

    class Rated(method):  # type: ignore[misc]
        def transform(self, parts: OptimizerParts) -> optax.GradientTransformationExtraArgs:
            inner = super().transform(parts)

            def init(params: Params) -> RateState:
                return RateState(jnp.float32(1), inner.init(params))

            def update(
                updates: Params, state: RateState, params: Params | None = None, *, learning_rate: Array, **extra: Any
            ) -> tuple[Params, RateState]:
                rate = learning_rate * state.rate
                updates, new = inner.update(updates, state.inner, params, learning_rate=rate, **extra)
                return updates, RateState(state.rate, new)

            return optax.GradientTransformationExtraArgs(init, update)

    return Rated


class PointTrainer(Trainer):
    """A trainer whose learning rate and seed can change without another compilation.

    Attributes:
      rate: factor on the learning rate.
    """

    rate = 1.0

    def set(self, rate: float, seed: int) -> None:
        """Sets the learning rate and the seed of the next run."""
        self.rate = rate
        self.key = put(run_key(seed, "steps"), self.layout.replicated)

    def start_task(self, state: TrainState, total: int, *, first: bool = True) -> TrainState:
        """See `Trainer.start_task`."""
        state = super().start_task(state, total, first=first)
        rate = put(jnp.float32(self.rate), self.layout.replicated)

        def rated(node: Any) -> Any:
            return node._replace(rate=rate) if isinstance(node, RateState) else node

        # Averaging and freezing keep the method's state within their own.
        found = jax.tree.map(rated, state.opt_state, is_leaf=lambda node: isinstance(node, RateState))
        return state.replace(opt_state=found)


class InMemory:
    """The checkpoints of a run that is never resumed: the params that its method may ask for again."""

    def __init__(self, layout: Any) -> None:
        self._marked: dict[str, Params] = {}
        self._layout = layout

    def latest_whole(self) -> None:
        """There is none to resume."""

    def save(self, state: TrainState, *, progress: Any, data: Any = None, mark: str | None = None) -> None:
        """Keeps the params of a marked state."""
        if mark is not None:
            # The step that follows deletes the state's own arrays.
            self._marked = {mark: jax.tree.map(lambda leaf: np.array(leaf, copy=True), state.params)}

    def find(self, mark: str) -> str | None:
        """The checkpoint with a mark."""
        return mark if mark in self._marked else None

    def params(self, target: Any, saved: str) -> Params:
        """The params of a checkpoint, on the devices."""
        return put(self._marked[saved], self._layout.params)

    def notes(self) -> list[Any]:
        """There are none."""
        return []

    def wait(self) -> None:
        """Nothing is being written."""


class Setting:
    """What all points of one method and its options share: data, compiled programs, and what is scored."""

    def __init__(self, point: Point, folder: Path) -> None:
        """Builds the parts; nothing is trained yet.

        Args:
          point: any of the points.
          folder: gets the rows and the tokenizer.
        """
        self.testbed = TESTBEDS[point.testbed]
        split = SPLIT_OF.get(point.order, "dev")
        method = {"name": point.method, **point.options}
        config = parse_config(self.testbed.config(point.tasks, split, method, folder), f"frontier, {point.name}")
        parts = build(config, RunFolder(folder))
        rated = with_rate(find_method(point.method))(config.method.options, parts.network, len(parts.tasks))
        self.trainer = PointTrainer(rated, config.optimizer, parts.layout, accumulate=1, seed=0)
        self.parts = dataclasses.replace(parts, method=rated, trainer=self.trainer)
        self._start = initial_params(parts)
        tasks = range(len(parts.tasks))
        self._scored = [self._batches(parts.pipeline([parts.encode(index, split)], batch_size=32)) for index in tasks]
        self._general = self._batches(self._general_text(), GENERAL_ROWS)
        self._labels = [label_tokens(parts, index) for index in tasks] if self.testbed.kind == "pairs" else []
        self._choose = jax.jit(functools.partial(choose, parts.network))
        self._diverge = jax.jit(functools.partial(diverge, parts.network))

    def components(self, point: Point, folder: Path) -> Components:
        """The parts of a point's run, whose folder is `folder`."""
        self.trainer.set(point.learning_rate, point.seed)
        config = self.parts.config.model_copy(update={"seed": point.seed, "output": str(folder)})
        parts = dataclasses.replace(self.parts, config=config)
        # Encoded once; the examples do not depend on the seed, only their order does.
        encoded = ("all_train_rows", "shapes", "learned_rows")
        parts.__dict__.update({name: getattr(self.parts, name) for name in encoded})
        return parts

    def score(self, params: Params, index: int) -> float:
        """Score of a task on its held-out rows."""
        if self.testbed.kind == "text":
            return self._nats(params, self._scored[index])
        sums = [self._choose(params, batch, self._labels[index]) for batch in self._scored[index]]
        right, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        return float(100 * right / count)

    def general(self, params: Params) -> float:
        """Nats per token of general text: the test rows of its default split."""
        return self._nats(params, self._general)

    def divergence(self, params: Params, index: int) -> float:
        """KL(starting model || params) on a batch of a task's held-out rows, nats per scored position."""
        sums = [self._diverge(self._start, params, batch) for batch in self._scored[index][:1]]
        total, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        return float(total / count)

    def _nats(self, params: Params, batches: Iterable[Batch]) -> float:
        return text_loss(self.parts.network, params, batches, compile=self.trainer.compile).loss

    def _general_text(self) -> Pipeline:
        rows = load_task(TaskSpec(name="general", source=f"text:{general_text()}")).test
        data = DataConfig(length=96)
        parts = self.parts
        objective: Literal["causal", "masked"] = "causal" if parts.network.causal else "masked"
        text = TextRows(rows, parts.tokenizer, data, objective=objective, task=0, name="general", cache=parts.cache)
        return Pipeline([text], 32, data)

    def _batches(self, pipeline: Pipeline, limit: int | None = None) -> list[Batch]:
        rows = pipeline.once(limit or self.testbed.rows, 0)
        return [place_batch(batch, self.parts.layout.batch) for batch in rows]


def label_tokens(parts: Components, index: int) -> Int[np.ndarray, " labels"]:
    """First token of each answer of a task, rising.

    Raises:
      ValueError: two answers begin with the same token.
    """
    task = parts.tasks[index]
    answers = sorted({row["answer"] for row in task.train})
    prompt = task.train.pick([0])[0]["prompt"]
    encoded = encode_answers(answers, [prompt] * len(answers), parts.tokenizer, parts.config.data)
    first = sorted({tokens[0] for tokens in encoded})
    if len(first) < len(answers):
        raise ValueError(f"task {task.name}: two of the answers {', '.join(answers)} begin with the same token")
    return np.array(first, np.int32)


def choose(
    network: Network, params: Params, batch: Batch, labels: Int[Array, " labels"]
) -> Float[Array, " right_count"]:
    """How often the label with the likeliest first token is the right one, and the number of real rows."""
    assert batch.predict is not None
    states = scored_states(network.hidden(params, batch).states, batch.predict[:, :1])[:, 0]
    chosen = labels[jnp.argmax(network.logits(params, states)[:, labels], axis=-1)]
    real = batch.weights[:, 0]
    return jnp.stack([jnp.sum((chosen == batch.targets[:, 0]) * real), jnp.sum(real)])


def diverge(network: Network, first: Params, second: Params, batch: Batch) -> Float[Array, " sum_count"]:
    """Sum over the scored positions of KL(first || second), in nats, and the number of positions."""

    def logits(params: Params) -> Array:
        return network.logits(params, scored_states(network.hidden(params, batch).states, batch.predict))

    each = full_divergence(jax.nn.log_softmax(logits(first), axis=-1), logits(second))
    return jnp.stack([jnp.sum(each * batch.weights), jnp.sum(batch.weights)])


class PointRun(TaskSequence):
    """A run that measures what a record holds instead of writing results."""

    def __init__(self, setting: Setting, point: Point, folder: Path) -> None:
        parts = setting.components(point, folder)
        super().__init__(parts, RunFolder(folder), cast(Checkpoints, InMemory(parts.layout)))
        self.setting = setting
        tasks, better = len(parts.tasks), setting.testbed.higher_is_better
        self.matrix = ContinualMatrix.empty(tasks, [better] * tasks, joint=parts.method.joint)
        self.general: list[float] = []
        self.divergence: list[float] = []
        self.kept_bytes = 0

    def _evaluate(self, state: TrainState, after: int) -> None:
        with self._timed("evaluation"):
            self.general.append(self.setting.general(state.params))
            for index in scored_tasks(self.parts, after):
                params = answering_params(self.parts, state, index)
                self.matrix = self.matrix.record(after, index, self.setting.score(params, index))
                if index == after:
                    self.divergence.append(self.setting.divergence(params, index))
            self.kept_bytes = kept_bytes(state, self.folder)


def kept_bytes(state: TrainState, folder: RunFolder) -> int:
    """Bytes that a method keeps of earlier tasks: its state, remembered examples, and what is stored with them."""
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state.method_state))
    kept = (folder.memory, folder.examples, folder.teacher)
    files = {path for place in kept for path in (place, *place.rglob("*")) if path.is_file()}
    return int(arrays + sum(path.stat().st_size for path in files))


def measure(setting: Setting, point: Point) -> dict[str, Any]:
    """Runs a point and returns its measurements.

    Returns:
      `matrix[t][i]`: score on task i after task t; `final`: mean of the last row; `bwt`: mean change of earlier tasks
      since each was learned, negative where something was forgotten; `anytime`: mean over the moments after each task
      of the mean over the tasks learned by then; `learned`: mean score right after each task; `general`: nats per token
      of general text before any task and after each; `drift`: its rise at the end; `divergence`: KL(starting model ||
      model right after each task) on the task's inputs, in nats; `kept_bytes`; `seconds`: by part, `all`, and
      `cpu`, those of the processor, which other programs on the machine do not lengthen.
    """
    started, used = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="frontier-") as folder:
        run = PointRun(setting, point, Path(folder))
        run.run()
    matrix = run.matrix
    rows = [[score for score in row if score is not None] for row in matrix.rows()]
    seconds = {**run.stopwatch.seconds, "all": time.monotonic() - started, "cpu": time.process_time() - used}
    found = {
        "final": matrix.overall_performance(),
        "bwt": matrix.backward_transfer(),
        "anytime": float(np.mean([np.mean(row) for row in rows])),
        "learned": float("nan") if matrix.joint else float(np.mean(np.diagonal(matrix.scores))),
        "drift": run.general[-1] - run.general[0],
        "general": run.general,
        "divergence": run.divergence,
        "matrix": rows,
        "kept_bytes": run.kept_bytes,
        "seconds": {part: round(value, 2) for part, value in seconds.items() if value >= 0.005},
    }
    return rounded(found)


def rounded(value: Any) -> Any:
    """Numbers to five decimals, `None` for those that are not finite."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 5) if np.isfinite(value) else None
    return value
