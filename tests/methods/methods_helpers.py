"""Tiny networks, batches and a stand-in for the task at hand."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.data.plan import Shape
from jaxcl.functional.losses import real_length
from jaxcl.functional.soft_masks import soft_masks
from jaxcl.methods.base import Method
from jaxcl.models.batch import Batch
from jaxcl.models.gates import Gates
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.models.roberta import RobertaConfig
from jaxcl.training.stored import Collate, trim

VOCAB = 13
ALL_TARGETS = ("query", "key", "value", "out", "gate", "up", "down")


def tiny_llama(**changes: Any) -> Network:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "init_std": 0.5,
        "max_length": 32,
    }
    return Network.create(LlamaConfig(**{**values, **changes}))


def tiny_roberta(**changes: Any) -> Network:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_layers": 2,
        "num_heads": 2,
        "init_std": 0.5,
        "max_length": 32,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return Network.create(RobertaConfig(**{**values, **changes}))


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


def init(network: Network, seed: int = 0) -> Any:
    return jax.jit(network.init)(jax.random.key(seed))


def perturbed(params: Any, scale: float, seed: int = 7) -> Any:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + scale * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


UNITS = ("attention/query", "attention/key", "attention/value", "attention/out/kernel", "mlp/")


def in_unit(name: str) -> bool:
    if "lora" in name:  # the side of the projection's own units
        return name.endswith("lora_a" if "attention/out" in name else "lora_b")
    return any(part in name for part in UNITS)


def named(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def filled(network: Network, value: float) -> Gates:
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), network.gates())


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

    def params_before(self) -> Any:
        return self._before

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(function)


def masks_of(network: Network, importance: Gates, shared: Any = "free") -> Any:
    """Soft masks of all params of a network."""
    return soft_masks(network.units(), network.shapes(), vars(importance), shared)


def stored_records(method: Method, params: Any, state: Any, batch: Batch, key: int = 0) -> list[dict[str, np.ndarray]]:
    """What the method stores of each row, without padding."""
    signals = jax.jit(method.signals)(params, state, batch, jax.random.key(key))
    host = {name: np.asarray(value) for name, value in signals.items()}
    length, predict = np.asarray(real_length(batch.segments)), np.asarray(real_length(batch.weights))
    return [
        trim(
            {name: value[row] for name, value in host.items()}, method.stored, length=length[row], predict=predict[row]
        )
        for row in range(batch.size)
    ]


def collated(method: Method, params: Any, state: Any, records: Any, length: int, predict: int | None) -> dict[str, Any]:
    """Records as a batch of rows of a shape carries them."""
    return jax.tree.map(jnp.asarray, Collate(method, params, state)(records, Shape(length, predict)))
