"""Scores on end tasks: a copy of the model is fine-tuned on a domain's labelled task and scored on it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxcl.evaluation.config import EndTaskConfig
from jaxcl.evaluation.metrics import f1
from jaxcl.evaluation.scoring import Compile, Each, Place, as_batch, each_now
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network, Params
from jaxcl.models.quantised import dequantised


class LabelledBatches(Protocol):
    """A pipeline of labelled rows, such as `jaxcl.data.pipeline.LabelledPipeline`; filler rows have weight 0."""

    steps_per_epoch: int

    def batch_at(self, step: int, *, seed: int) -> Mapping[str, Any]:
        """The batch of a training step; reshuffled every epoch."""
        ...

    def once(self) -> Iterator[Mapping[str, Any]]:
        """One pass; the last batch is completed with filler rows."""
        ...


@dataclasses.dataclass(frozen=True)
class EndTaskScore:
    """Test scores of fine-tuned copies, in percent; means over the repetitions.

    Attributes:
      macro_f1: F1 averaged over the classes.
      micro_f1: F1 over all decisions.
      accuracy: share of correctly classified rows.
      runs: per repetition, the same scores, the best `dev` score, and the number of `epochs`.
      predictions: class of each test row in the first repetition, int32 `[rows]`.
      labels: expected class of each test row.
      seconds: wall-clock time of all repetitions.
    """

    macro_f1: float
    micro_f1: float
    accuracy: float
    runs: list[dict[str, float]]
    predictions: Int[np.ndarray, " rows"]
    labels: Int[np.ndarray, " rows"]
    seconds: float

    def metric(self, name: str) -> float:
        """`macro_f1`, `micro_f1` or `accuracy`."""
        return {"macro_f1": self.macro_f1, "micro_f1": self.micro_f1, "accuracy": self.accuracy}[name]

    def deviation(self, name: str) -> float | None:
        """Sample standard deviation of a metric over the repetitions; `None` if there was only one."""
        return float(np.std([run[name] for run in self.runs], ddof=1)) if len(self.runs) > 1 else None


class _State(NamedTuple):
    params: Params
    moments: optax.OptState
    step: Int[Array, ""]
    total: Int[Array, ""]


class _Programs(NamedTuple):
    start: Callable[[Params, Array, Array], _State]
    train: Callable[[_State, Batch, Array], _State]
    classify: Callable[[Params, Batch], tuple[Array, Array | None, Array]]


def score_end_task(
    network: Network,
    params: Params,
    train: LabelledBatches,
    test: LabelledBatches,
    *,
    dev: LabelledBatches | None,
    num_labels: int,
    metric: str = "macro_f1",
    config: EndTaskConfig,
    seed: int,
    compile: Compile = jax.jit,
    place: Place = as_batch,
    each: Each = each_now,
) -> EndTaskScore:
    """Fine-tunes copies of a model on a labelled task and scores them; `params` is not changed.

    Every repetition draws its own classification head, order of examples and dropout. After each epoch the dev rows are
    scored; the params with the best dev score are tested, and training stops after `patience` epochs without a better
    one. Without dev rows, all epochs are run and the last params are tested.

    Args:
      network: the pre-trained model; its classification head, if any, is not used.
      params: its params.
      train: training rows.
      test: test rows.
      dev: rows for early stopping; `None`: no early stopping.
      num_labels: number of classes.
      metric: score for early stopping: `macro_f1`, `micro_f1` or `accuracy`.
      config: how to fine-tune.
      seed: seed of the first repetition; the others use the next seeds.
      compile: compiles the steps; called with the same functions for all tasks with the same number of classes.
      place: makes a batch on the devices from a pipeline's rows.
      each: goes over the repetitions.

    Returns:
      Test scores, means over `config.seeds` repetitions.
    """
    started = time.monotonic()
    classifier = with_labels(network, num_labels)
    programs = _programs(classifier, config, compile)

    def repeat(repetition: int) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
        tuned, epochs, dev_score = _fine_tune(programs, params, train, dev, metric, config, seed + repetition, place)
        predictions, labels = _classify_all(programs, tuned, test, place)
        scores = {**class_scores(predictions, labels), "dev": dev_score, "epochs": float(epochs)}
        return scores, predictions, labels

    found = each(repeat, range(config.seeds))
    runs = [run for run, _, _ in found]
    means = {name: float(np.mean([run[name] for run in runs])) for name in ("macro_f1", "micro_f1", "accuracy")}
    predictions, labels = (np.asarray(one, np.int32) for one in found[0][1:])
    return EndTaskScore(**means, runs=runs, predictions=predictions, labels=labels, seconds=time.monotonic() - started)


def class_scores(predictions: Int[np.ndarray, " rows"], labels: Int[np.ndarray, " rows"]) -> dict[str, float]:
    """Macro-F1, micro-F1 and accuracy of class numbers, in percent.

    >>> class_scores(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1]))["accuracy"]
    75.0
    """
    given, expected = predictions.tolist(), labels.tolist()
    return {
        "macro_f1": f1("macro", given, expected),
        "micro_f1": f1("micro", given, expected),
        "accuracy": 100.0 * float(np.mean(predictions == labels)),
    }


def with_labels(network: Network, num_labels: int) -> Network:
    """The same network with a classification head for `num_labels` classes, and nothing quantised."""
    return Network.create(network.unquantised.config.model_copy(update={"num_labels": num_labels}))


def with_body(fresh: Params, pretrained: Params) -> Params:
    """Params of a classifier: a fresh classification head, and everything else from a pre-trained model.

    Raises:
      ValueError: the params belong to different networks.
    """
    body = {name: fresh[name] if name == "classifier" else pretrained.get(name) for name in fresh}
    if jax.tree.map(jnp.shape, body) != jax.tree.map(jnp.shape, fresh):
        raise ValueError("pretrained: expected params of the classifier's network, got those of another")
    return body


def _fine_tune(
    programs: _Programs,
    params: Params,
    train: LabelledBatches,
    dev: LabelledBatches | None,
    metric: str,
    config: EndTaskConfig,
    seed: int,
    place: Place,
) -> tuple[Params, int, float]:
    """The best params, the number of epochs run, and the best dev score (NaN without dev rows)."""
    head_key, dropout_key = jax.random.split(jax.random.key(seed))
    state = programs.start(params, head_key, jnp.int32(config.epochs * train.steps_per_epoch))
    best, best_score, best_epoch = state.params, -1.0, 0
    for epoch in range(1, config.epochs + 1):
        for step in range((epoch - 1) * train.steps_per_epoch, epoch * train.steps_per_epoch):
            state = programs.train(state, place(train.batch_at(step, seed=seed)), dropout_key)
        if dev is None:
            continue
        score = class_scores(*_classify_all(programs, state.params, dev, place))[metric]
        if score > best_score:
            best, best_score, best_epoch = state.params, score, epoch
        elif epoch - best_epoch >= config.patience:
            break
    if dev is None:
        return state.params, config.epochs, float("nan")
    return best, epoch, best_score


def _classify_all(
    programs: _Programs, params: Params, rows: LabelledBatches, place: Place
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and expected class of every row, without filler rows."""
    predictions, labels = [], []
    for fields in rows.once():
        batch = place(fields)
        # Compiled results are replicated, so every process has all rows; the batch itself may be split.
        predicted, expected, real = jax.device_get(programs.classify(params, batch))
        predictions.append(predicted[real])
        labels.append(expected[real])
    return np.concatenate(predictions), np.concatenate(labels)


@functools.lru_cache(maxsize=8)
def _programs(network: Network, config: EndTaskConfig, compile: Compile) -> _Programs:
    """The compiled functions for a classifier, cached for later tasks."""
    optimizer = _optimizer(config)

    def start(pretrained: Params, key: Array, total: Int[Array, ""]) -> _State:
        # Params and moments in float32 even if the model is held in bfloat16, whose steps are too coarse.
        params = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32), with_body(network.init(key), dequantised(pretrained))
        )
        return _State(params, optimizer.init(params), jnp.int32(0), total)

    def loss(params: Params, batch: Batch, key: Array) -> Float[Array, ""]:
        hidden_key, head_key = jax.random.split(key)
        states = network.hidden(params, batch, dropout_key=hidden_key).states
        scores = network.classify(params, states, batch, dropout_key=head_key)
        each = optax.softmax_cross_entropy_with_integer_labels(scores, batch.labels)
        weights = batch.weights[:, 0]
        return jnp.where(weights > 0, each * weights, 0.0).sum() / jnp.maximum(weights.sum(), 1.0)

    def train(state: _State, batch: Batch, key: Array) -> _State:
        grads = jax.grad(loss)(state.params, batch, jax.random.fold_in(key, state.step))
        direction, moments = optimizer.update(grads, state.moments, state.params)
        rate = learning_rate(config, state.step, state.total)
        params = jax.tree.map(lambda leaf, by: leaf - rate * by, state.params, direction)
        return _State(params, moments, state.step + 1, state.total)

    def classify(params: Params, batch: Batch) -> tuple[Array, Array | None, Array]:
        """Predicted class, expected class, and whether the row counts, per row."""
        scores = network.classify(params, network.hidden(params, batch).states, batch)
        return jnp.argmax(scores, axis=-1), batch.labels, batch.weights[:, 0] > 0

    return _Programs(compile(start), compile(train), compile(classify))


def learning_rate(config: EndTaskConfig, step: Int[Array, ""], total: Int[Array, ""]) -> Float[Array, ""]:
    """Linear warm-up over the first share of the steps, then linear decay to 0 after the last.

    It starts above 0, because short fine-tuning has no steps to waste.

    Args:
      config: `learning_rate` is the peak, `warmup` the share.
      step: number of finished steps.
      total: total number of steps.
    """
    rise = jnp.round(config.warmup * total)
    return config.learning_rate * jnp.minimum((step + 1) / (rise + 1), (total - step) / jnp.maximum(total - rise, 1))


def _optimizer(config: EndTaskConfig) -> optax.GradientTransformation:
    """AdamW with clipping, without the learning rate."""

    def decayed(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )
