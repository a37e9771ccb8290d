"""Scores of a model: its answers compared with expected ones, and its loss on text."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcl.evaluation.metrics import find_metric
from jaxcl.functional.losses import scored_states, token_losses
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network, Params

Generate = Callable[[list[str]], list[str]]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
Place = Callable[[Mapping[str, Any]], Batch]
Each = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]
"""`each(do, items)`: what `do` returns of each item, in order; perhaps of an earlier attempt, as plain lists."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """A task's score and the examples behind it.

    Attributes:
      metric: name of the metric.
      score: the score, in the metric's unit.
      rows: one per example: `prompt, prediction, answer, score, correct` (`correct`: it has the full score).
    """

    metric: str
    score: float
    rows: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class TextLoss:
    """Loss on a text, summed over the predicted tokens.

    Attributes:
      nats: sum of the negative log-likelihoods.
      correct: number of tokens whose most likely prediction is right.
      tokens: number of predicted tokens (weighted, if weights are not 0 or 1).
    """

    nats: float
    correct: float
    tokens: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """`exp` of the loss per token; infinite if that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def token_accuracy(self) -> float:
        """Share of correctly predicted tokens, in percent."""
        return 100.0 * self.correct / self.tokens

    def metric(self, name: str) -> float:
        """`perplexity` or `token_accuracy`."""
        return {"perplexity": self.perplexity, "token_accuracy": self.token_accuracy}[find_metric(name, "text").name]


def each_now(do: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """What `do` returns of each item, in order."""
    return list(map(do, items))


def as_batch(batch: Batch | Mapping[str, Any]) -> Batch:
    """A batch unchanged, or made from the fields that a pipeline yields."""
    return batch if isinstance(batch, Batch) else Batch(**batch)


def drawn(count: int, limit: int | None) -> list[int]:
    """Which of `count` examples a limit keeps: a fixed draw, the same for every method and seed.

    >>> drawn(3, None), len(drawn(1000, 10)), drawn(1000, 10) == drawn(1000, 10)
    ([0, 1, 2], 10, True)
    """
    if limit is None or limit >= count:
        return list(range(count))
    # Not the first ones, because many published files are sorted by class or source.
    return sorted(np.random.default_rng(count).choice(count, size=limit, replace=False).tolist())


def score_pairs(
    rows: Sequence[Mapping[str, str]],
    generate: Generate,
    metric: str,
    *,
    batch_size: int,
    limit: int | None = None,
    progress: Callable[[int], object] | None = None,
    each: Each = each_now,
) -> Scored:
    """Generates answers to prompts and scores them.

    Args:
      rows: `{"prompt", "answer"}`, and `"source"` for metrics of rewriting if it is not the whole prompt.
      generate: from prompts to answers, in order; called with at most `batch_size` prompts of similar length.
      metric: name of the metric.
      batch_size: maximal number of prompts per call.
      limit: score at most this number of rows; see `drawn`.
      progress: called after each batch with its number of rows.
      each: goes over the batches.

    Returns:
      The score and one row per example, in the order of `rows`.

    Raises:
      UserError: unknown metric.
      ValueError: no rows, or `generate` returned a wrong number of answers.
    """
    measure = find_metric(metric, "pairs")
    chosen = [rows[index] for index in drawn(len(rows), limit)]
    if not chosen:
        raise ValueError("rows: expected at least one example, got none")
    predictions = [""] * len(chosen)
    # Sorted by length, because a batch is padded to its longest prompt.
    order = sorted(range(len(chosen)), key=lambda index: len(chosen[index]["prompt"]))
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def answer(part: list[int]) -> list[str]:
        written = generate([chosen[index]["prompt"] for index in part])
        if len(written) != len(part):
            raise ValueError(f"generate: expected {len(part)} answers, got {len(written)}")
        if progress is not None:
            progress(len(part))
        return written

    for part, written in zip(parts, each(answer, parts), strict=True):
        for index, text in zip(part, written, strict=True):
            predictions[index] = text
    answers = [row["answer"] for row in chosen]
    sources = [row.get("source", row["prompt"]) for row in chosen]
    values = measure.each(predictions, answers, sources)
    scored = [
        {"prompt": row["prompt"], "prediction": text, "answer": row["answer"], "score": value, "correct": value > 99.99}
        for row, text, value in zip(chosen, predictions, values, strict=True)
    ]
    return Scored(metric, measure(predictions, answers, sources), scored)


def text_loss(
    network: Network,
    params: Params,
    batches: Iterable[Batch | Mapping[str, Any]],
    *,
    compile: Compile = jax.jit,
    place: Place = as_batch,
    each: Each = each_now,
) -> TextLoss:
    """Loss on the scored positions of all batches; exact also if batches have different numbers of tokens.

    Masked models are scored at the masked positions: use a fixed masking seed, or two calls are not comparable. Dropout
    is off.

    Args:
      network: any network with a language-model head.
      params: its params.
      batches: one pass over the text, as from `pipeline.once(...)`; filler rows (weights 0) do not count.
      compile: compiles the step: `jax.jit` or the run's compiler; called once per network.
      place: makes a batch on the devices from a pipeline's rows.
      each: goes over the batches.

    Returns:
      Sums over all batches, accumulated in double precision.

    Raises:
      ValueError: there is no predicted token.
    """
    step = _text_step(network, compile)
    # Device scalars are collected and read at the end, so that the device never waits for the host.
    sums = each(lambda batch: step(params, batch if isinstance(batch, Batch) else place(batch)), batches)
    nats, correct, tokens = (np.asarray(jax.device_get(sums), dtype=np.float64).reshape(-1, 3)).sum(axis=0).tolist()
    if tokens <= 0:
        raise ValueError("batches: expected at least one predicted token, got none")
    return TextLoss(nats, correct, tokens)


@functools.lru_cache(maxsize=8)
def _text_step(network: Network, compile: Compile) -> Callable[[Params, Batch], tuple[Array, Array, Array]]:
    def step(params: Params, batch: Batch) -> tuple[Array, Array, Array]:
        nats, right, count = row_sums(network, params, batch)
        return nats.sum(), right.sum(), count.sum()

    return compile(step)


def row_sums(
    network: Network, params: Params, batch: Batch
) -> tuple[Float[Array, " batch"], Float[Array, " batch"], Float[Array, " batch"]]:
    """Weighted sums over the scored positions of each row: loss in nats, right predictions, positions.

    Args:
      network: any network with a language-model head.
      params: its params.
      batch: token rows.
    """
    states = scored_states(network.hidden(params, batch).states, batch.predict)

    def row(
        inputs: tuple[Float[Array, "predict embed"], Array, Float[Array, " predict"]],
    ) -> tuple[Array, Array, Array]:
        states, targets, weights = inputs
        logits = network.logits(params, states)
        nats = token_losses(logits, targets)
        right = jnp.argmax(logits, axis=-1) == targets
        return (nats * weights).sum(), (right * weights).sum(), weights.sum()

    # One row at a time: the logits of a whole batch would be by far the largest array of the program.
    return jax.lax.map(row, (states, batch.targets, batch.weights))
