r"""Which attention heads to distil: sensitivity, forgettability and budgets (SEEKR, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HeadImportance = Literal[
    "product_of_sums", "product_of_shares", "sum_of_products", "sensitivity", "forgettability", "random"
]
Heads = Float[Array, "layers heads"]


class HeadSums(NamedTuple):
    """A running mean over (example, query, key) triples.

    Attributes:
      total: sums of squares.
      triples: how many, the same for all heads; by layer where some layers see less than others.
    """

    total: Heads
    triples: Float[Array, ""] | Float[Array, "layers 1"]

    @classmethod
    def zero(cls, layers: int, heads: int) -> HeadSums:
        """Nothing yet, for this many layers and heads per layer."""
        return cls(jnp.zeros((layers, heads)), jnp.float32(0))

    def add(self, squares: Heads, triples: Float[Array, ""] | Float[Array, "layers 1"]) -> HeadSums:
        """The sums with a batch added: each head's sum of squares, and over how many triples it was taken."""
        return HeadSums(self.total + squares, self.triples + triples)

    def mean(self) -> Heads:
        """Mean square; 0 where there was nothing."""
        return self.total / jnp.maximum(self.triples, 1.0)


@jax.custom_vjp
def _watch(probs: Array, seen: Array, dummy: Array) -> Array:
    return probs


def _watch_forward(probs: Array, seen: Array, dummy: Array) -> tuple[Array, Array]:
    return probs, seen


def _watch_backward(seen: Array, cotangent: Array) -> tuple[Array, None, Array]:
    square = jnp.where(seen, jnp.square(cotangent.astype(jnp.float32)), 0.0)
    return cotangent, None, jnp.sum(square, axis=(0, 2, 3))


_watch.defvjp(_watch_forward, _watch_backward)


def watch(
    probs: Float[Array, "batch heads query length"],
    seen: Bool[Array, "batch 1 query length"],
    dummy: Float[Array, " heads"],
) -> Float[Array, "batch heads query length"]:
    """The identity on attention probabilities, whose backward pass sums their squared gradients (SEEKR, equation 3).

    Put it between the softmax and the product with the values. The gradient of `dummy` is then the sum of squares of
    the gradient of `probs` over rows, queries and keys where `seen`; no array of the size of `probs` is kept for it. It
    is not linear in the cotangent, so it means something only after one backward pass of one loss.

    Args:
      probs: attention probabilities.
      seen: which (query, key) pairs count.
      dummy: zeros; its gradient is the result.
    """
    return _watch(probs, seen, dummy)


def normalise_sensitivity(sensitivity: Heads) -> Heads:
    """Scaled so that the heads of each layer sum to 1; a layer of zeros stays."""
    total = jnp.sum(sensitivity, axis=-1, keepdims=True)
    return sensitivity / jnp.where(total == 0, 1.0, total)


def combine(
    sensitivity: Float[Array, "tasks layers heads"],
    forgettability: Float[Array, "tasks layers heads"],
    how: HeadImportance,
    key: Array | None = None,
) -> Heads:
    """Importance of heads over the tasks so far (SEEKR, equation 5).

    Args:
      sensitivity: normalised, by task; zeros for tasks to come.
      forgettability: by task; zeros for tasks to come. Over all queries; the authors' code takes the sampled ones.
      how: `product_of_sums` is the paper's, `sum_of_products` that of the authors' code. `product_of_shares` is the
        paper's with each task's forgettability scaled to sum to 1 over all heads: it is a mean over keys, so with the
        sum of the unscaled the tasks with the shortest rows decide. `sensitivity` and `forgettability` take one of the
        two alone; `random` draws from [0, 1) and looks at neither.
      key: what `random` draws from.

    Raises:
      ValueError: `random` without a key.

    Examples:
      >>> s, f = jnp.array([[[1.0]], [[2.0]]]), jnp.array([[[3.0]], [[4.0]]])
      >>> float(combine(s, f, "product_of_sums")[0, 0]), float(combine(s, f, "sum_of_products")[0, 0])
      (21.0, 11.0)
    """
    rules: dict[str, Callable[[], Heads]] = {
        "product_of_sums": lambda: jnp.sum(sensitivity, axis=0) * jnp.sum(forgettability, axis=0),
        "product_of_shares": lambda: jnp.sum(sensitivity, axis=0) * jnp.sum(_shares(forgettability), axis=0),
        "sum_of_products": lambda: jnp.sum(sensitivity * forgettability, axis=0),
        "sensitivity": lambda: jnp.sum(sensitivity, axis=0),
        "forgettability": lambda: jnp.sum(forgettability, axis=0),
    }
    if how == "random":
        if key is None:
            raise ValueError("key: random importance needs one to draw from")
        return jax.random.uniform(key, sensitivity.shape[1:])
    return rules[how]()


def _shares(values: Float[Array, "*tasks layers heads"]) -> Float[Array, "*tasks layers heads"]:
    """Scaled so that each task's sum to 1; those of a task to come stay 0."""
    total = jnp.sum(values, axis=(-2, -1), keepdims=True)
    return values / jnp.where(total == 0, 1.0, total)


def resolve_budget(budget: int | float, total: int) -> int:
    """A budget as a number: an integer is taken as it is, a fraction is a share of `total`, at least 1.

    Examples:
      >>> resolve_budget(24, 32), resolve_budget(0.75, 32), resolve_budget(0.01, 32)
      (24, 24, 1)

    Raises:
      ValueError: below 1 (0 as a fraction), or over `total`.
    """
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(
                f"{budget} is not a share: allowed are above 0 to 1.0, or a whole number from 1 to {total}"
            )
        return max(1, round(budget * total))
    if not 1 <= budget <= total:
        raise ValueError(f"{budget} is not within 1 to {total}")
    return budget


@jax.named_scope("importance")
def select_heads(importance: Heads, layers: int, heads: int, per_layer: int) -> Int[Array, "selected 2"]:
    """The most important heads of the most important layers.

    First the `layers` layers with the largest total importance, then the `heads` heads with the largest importance
    within these. Of equals, the first comes first.

    Args:
      importance: of each head, 0 or more.
      layers: number of layers; static.
      heads: number of heads; static, at most `layers * per_layer`.
      per_layer: the most heads selected in one layer; static. The paper sets no such limit.

    Returns:
      (layer, head) of each selected head, in rising order, int32.
    """
    order = jnp.argsort(-jnp.sum(importance, axis=1), stable=True)
    chosen = jnp.zeros(importance.shape[0], bool).at[order[:layers]].set(True)
    places = jnp.argsort(jnp.argsort(-importance, axis=1, stable=True), axis=1)
    allowed = chosen[:, None] & (places < per_layer)
    flat = jnp.where(allowed, importance, -jnp.inf).reshape(-1)
    best = jnp.sort(jnp.argsort(-flat, stable=True)[:heads])
    return jnp.stack([best // importance.shape[1], best % importance.shape[1]], axis=-1).astype(jnp.int32)
