"""A model, data and methods small enough to compute by hand."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import Method
from jaxcl.models.batch import Batch
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.trainer import Trainer

VOCAB, EMBED, LENGTH = 11, 8, 6
SHAPES = {
    "embed": {"embedding": jax.ShapeDtypeStruct((VOCAB, EMBED), jnp.float32)},
    "head": {
        "kernel": jax.ShapeDtypeStruct((EMBED, VOCAB), jnp.float32),
        "bias": jax.ShapeDtypeStruct((VOCAB,), jnp.float32),
    },
}
AXES = {
    "embed": {"embedding": ("vocab", "embed")},
    "head": {"kernel": ("embed", "vocab"), "bias": ("vocab",)},
}


def make_params(seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), SHAPES)


class TinyMethod(Method):
    """Next-token loss with dropout on the embeddings, and a second term that is counted by rows.

    Attributes:
      traces: how often `loss` was traced.
      dropout: share of embedding features dropped.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(None, None, 1)  # type: ignore[arg-type]
        self.traces = 0
        self.dropout = dropout

    def init(self, params: Any) -> Any:
        return {"snapshot": params, "seen": jnp.zeros((3,))}

    def loss(self, params: Any, state: Any, batch: Batch, key: Any) -> Terms:
        self.traces += 1
        x = params["embed"]["embedding"][batch.tokens]
        if self.dropout:
            x = x * jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        scores = jax.nn.log_softmax(x @ params["head"]["kernel"] + params["head"]["bias"])
        picked = -jnp.take_along_axis(scores, batch.targets[..., None], -1)[..., 0]
        rows = jnp.any(batch.weights > 0, axis=1)
        size = jnp.sum(jnp.sum(jnp.square(x), (1, 2)) * rows)
        return {
            "lm": Term(jnp.sum(picked * batch.weights), jnp.sum(batch.weights)),
            "size": Term(size, jnp.sum(rows).astype(jnp.float32), 0.01),
        }


def make_rows(seed: int, batch: int = 8, origin: str = "task", uneven: bool = False) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB, (batch, LENGTH))
    weights = np.ones((batch, LENGTH))
    if uneven:
        weights = (np.arange(LENGTH) < random.integers(0, LENGTH + 1, (batch, 1))).astype(float)
        weights[0] = 1
    return {
        "tokens": tokens,
        "segments": (weights > 0).astype(int),
        "positions": np.tile(np.arange(LENGTH), (batch, 1)),
        "predict": None,
        "targets": random.integers(0, VOCAB, (batch, LENGTH)),
        "weights": weights,
        "task": np.zeros(batch, int),
        "example": np.arange(batch),
        "origin": origin,
    }


class Rows:
    """Endless rows that are a pure function of their position; every third batch may be remembered ones."""

    def __init__(self, batch: int = 8, memory: bool = False, end: int | None = None) -> None:
        self.batch, self.memory, self.end, self.position = batch, memory, end, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        if self.end is not None and self.position >= self.end:
            raise StopIteration
        self.position += 1
        origin = "memory" if self.memory and self.position % 3 == 0 else "task"
        return make_rows(self.position, self.batch, origin, uneven=True)

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Collect:
    """A sink that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: Any) -> None:
        self.rows.append(dict(row))

    def close(self) -> None:
        pass


def one_device() -> Layout:
    return Layout.create(make_mesh(MeshConfig(), jax.devices()[:1]), AXES, SHAPES)


def make_trainer(method: Method | None = None, *, accumulate: int = 1, **optimizer: Any) -> Trainer:
    """A trainer; those of the plain method are shared by all tests, and so is what they have compiled."""
    if method is None:
        return shared_trainer(accumulate=accumulate, **optimizer)
    section = OptimizerConfig(**{"learning_rate": 0.05, "schedule": "linear", "warmup": 2, **optimizer})
    return Trainer(method, section, one_device(), accumulate=accumulate, seed=0)


@functools.cache
def shared_trainer(dropout: float = 0.0, accumulate: int = 1, **optimizer: Any) -> Trainer:
    return make_trainer(TinyMethod(dropout), accumulate=accumulate, **optimizer)


def host(tree: Any) -> Any:
    """A copy that no donation can touch."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, host(one), host(other))
