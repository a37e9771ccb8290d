"""Batches, and a task whose batches lie in memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.models.batch import Batch
from tests.tiny.networks import VOCAB


def make_batch(
    lengths: tuple[int, ...] = (6, 4, 5), *, length: int = 7, predict: int = 3, seed: int = 0, **fields: Any
) -> Batch:
    """Rows of the given numbers of tokens (0: a filler row), of which up to `predict` positions are scored."""
    rng = np.random.default_rng(seed)
    rows = len(lengths)
    tokens = rng.integers(2, VOCAB, (rows, length))
    index = np.arange(length)
    real = index[None] < np.array(lengths)[:, None]
    scored = np.zeros((rows, predict), np.int32)
    weights = np.zeros((rows, predict), np.float32)
    for row, count in enumerate(lengths):
        chosen = np.sort(rng.permutation(max(count, 1))[: min(predict - row % 2, count)])
        scored[row, : len(chosen)] = chosen
        weights[row, : len(chosen)] = 1
    values: dict[str, Any] = {
        "tokens": np.where(real, tokens, 1),
        "segments": real.astype(np.int32),
        "positions": np.where(real, index, 0),
        "predict": scored,
        "targets": rng.integers(2, VOCAB, (rows, predict)),
        "weights": weights,
        "task": np.zeros(rows, np.int32),
        "example": np.where(np.array(lengths) > 0, np.arange(rows), -1),
    }
    arrays = {name: jnp.asarray(value) for name, value in values.items()}
    return Batch(**{**arrays, **fields})


def make_pairs(sizes: Sequence[tuple[int, int]], *, length: int = 7, seed: int = 0) -> Batch:
    """Rows of a prompt and an answer with the given numbers of tokens, as `jaxcl.data.PairRows` lays them out.

    Answers end with token 1, which is nowhere else; a row without tokens fills the batch.
    """
    rng = np.random.default_rng(seed)
    most = max(answer for _, answer in sizes)
    tokens, places = np.zeros((len(sizes), length), np.int32), np.zeros((len(sizes), most), np.int32)
    index = np.arange(length)
    for row, (prompt, answer) in enumerate(sizes):
        tokens[row, : prompt + answer] = rng.integers(2, VOCAB, prompt + answer)
        places[row, :answer] = np.arange(answer) + prompt - 1
        tokens[row, prompt + answer - 1 : prompt + answer] = 1
    real = index < np.sum(sizes, axis=1)[:, None]
    scored = np.arange(most) < np.array(sizes)[:, 1:]
    targets = np.where(scored, np.take_along_axis(tokens, places + scored, axis=1), 0)
    return Batch(
        tokens=jnp.asarray(tokens),
        segments=jnp.asarray(real, jnp.int32),
        positions=jnp.asarray(np.where(real, index, 0), jnp.int32),
        predict=jnp.asarray(places),
        targets=jnp.asarray(targets),
        weights=jnp.asarray(scored, jnp.float32),
        task=jnp.zeros(len(sizes), jnp.int32),
        example=jnp.asarray(np.where(np.sum(sizes, axis=1) > 0, np.arange(len(sizes)), -1), jnp.int32),
        packed=False,
    )


def batch_of(segments: np.ndarray | list[list[int]], tokens: np.ndarray | None = None, **fields: Any) -> Batch:
    """A batch with the given segments, scored everywhere; positions count from 0 within each segment."""
    segments = np.asarray(segments, np.int32)
    rows, length = segments.shape
    positions = np.zeros_like(segments)
    for row in range(rows):
        for at in range(1, length):
            same = segments[row, at] == segments[row, at - 1]
            positions[row, at] = positions[row, at - 1] + 1 if same else 0
    if tokens is None:
        tokens = np.random.default_rng(0).integers(0, VOCAB, segments.shape)
    return Batch(
        tokens=jnp.asarray(tokens, jnp.int32),
        segments=jnp.asarray(segments),
        positions=jnp.asarray(positions),
        predict=None,
        targets=jnp.asarray(np.roll(tokens, -1, 1), jnp.int32),
        weights=jnp.asarray(segments != 0, jnp.float32),
        task=jnp.zeros(rows, jnp.int32),
        example=jnp.full(rows, -1, jnp.int32),
        **fields,
    )


def take_rows(batch: Batch, rows: Any) -> Batch:
    return jax.tree.map(lambda leaf: leaf[np.asarray(rows)], batch)


def pad_batch(batch: Batch, *, rows: int = 0, length: int = 0, predict: int = 0) -> Batch:
    """The batch with filler rows, padding tokens (of a wild token id) and unscored positions added."""

    def pad(x: jax.Array, *more: int, value: int = 0) -> jax.Array:
        return jnp.pad(x, [(0, amount) for amount in more], constant_values=value)

    assert batch.predict is not None
    return dataclasses.replace(
        batch,
        tokens=pad(batch.tokens, rows, length, value=5),
        segments=pad(batch.segments, rows, length),
        positions=pad(batch.positions, rows, length),
        predict=pad(batch.predict, rows, predict),
        targets=pad(batch.targets, rows, predict, value=3),
        weights=pad(batch.weights, rows, predict),
        task=pad(batch.task, rows),
        example=pad(batch.example, rows, value=-1),
    )


def assert_same_batch(left: dict, right: dict) -> None:
    """Of batches as the data layer makes them."""
    assert left.keys() == right.keys()
    for name in left:
        if isinstance(left[name], dict):
            assert_same_batch(left[name], right[name])
        elif isinstance(left[name], np.ndarray):
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)
        else:
            assert left[name] == right[name]


def same_batch(left: dict, right: dict) -> bool:
    return left["tokens"].shape == right["tokens"].shape and bool((left["tokens"] == right["tokens"]).all())


class StandInTask:
    """A task whose batches lie in memory."""

    def __init__(
        self,
        batches: list[Batch],
        *,
        index: int = 0,
        before: Any = None,
        memory: list[Batch] | None = None,
        seed: int = 0,
    ) -> None:
        self.index = index
        self.name = f"task{index}"
        self.count = 2
        self.key = jax.random.key(seed)
        self._batches = batches
        self._memory = batches if memory is None else memory
        self._before = before
        self.limits: list[int | None] = []

    def examples(self, limit: int | None = None) -> Iterator[Batch]:
        self.limits.append(limit)
        return iter(self._batches)

    def memory(self) -> Iterator[Batch]:
        return iter(self._memory)

    def fold(self, add: Any, start: Any, *, limit: int | None = None, memory: bool = False) -> Any:
        return functools.reduce(add, self.memory() if memory else self.examples(limit), start)

    def params_before(self) -> Any:
        return self._before

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(function)
