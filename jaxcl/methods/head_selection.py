r"""Which attention heads to distil: sensitivity, forgettability and budgets (SEEKR, sections 3.2 and 3.3).

Neither measure holds an attention map longer than its layer, and both count real, visible (query, key) pairs only;
the authors' code counts padding and future keys too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcl.methods.base import Params
from jaxcl.methods.losses import example_losses
from jaxcl.models.batch import Batch
from jaxcl.models.mask import visible
from jaxcl.models.network import Network
from jaxcl.models.probe import AttentionView, Probe, Tap, selected_rows

Importance = Literal["product_of_sums", "sum_of_products", "sensitivity", "forgettability", "random"]
Heads = Float[Array, "layers heads"]


class HeadSums(NamedTuple):
    """A mean over (example, query, key) triples in the making.

    Attributes:
      total: sums of squares.
      triples: how many, the same for all heads.
    """

    total: Heads
    triples: Float[Array, ""]

    @classmethod
    def zero(cls, network: Network) -> HeadSums:
        """Nothing yet."""
        return cls(jnp.zeros((network.num_layers, network.num_heads)), jnp.float32(0))

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
    """The identity on `probs`, whose backward pass leaves a trace: `Tap.function` of `add_sensitivity`.

    The gradient of `dummy` is the sum of squares of the gradient of `probs` over rows, queries and keys where `seen`.
    It is not linear in the cotangent, so only one backward pass of one loss makes sense of it.
    """
    return _watch(probs, seen, dummy)


@jax.named_scope("importance")
def add_sensitivity(network: Network, sums: HeadSums, params: Params, batch: Batch, chunk: int) -> HeadSums:
    r"""Adds a batch to the mean square of d(loss) / d(attention weight) (SEEKR, equation 3).

    The loss of an example is its own mean over its scored positions, so how examples are put into batches changes
    nothing. Layers are rematerialised whatever the configuration says: the backward pass then holds the attention
    maps of one layer at a time.

    Args:
      network: the network.
      sums: what was added so far.
      params: the network's params.
      batch: token rows.
      chunk: see `losses.over_positions`; static.
    """
    compute = network.config.compute.model_copy(update={"remat": "full"})
    network = Network.create(network.config.model_copy(update={"compute": compute}))

    def loss(dummy: Array) -> Array:
        states = network.hidden(params, batch, tap=Tap(watch, dummy)).states
        return jnp.sum(example_losses(network, params, states, batch, chunk))

    squares = jax.grad(loss)(jnp.zeros_like(sums.total))
    return HeadSums(sums.total + squares, sums.triples + _pairs(network, batch))


@jax.named_scope("importance")
def add_forgettability(network: Network, sums: HeadSums, before: Params, after: Params, batch: Batch) -> HeadSums:
    """Adds a batch to the mean squared change of attention weights between two sets of params (SEEKR, equation 4).

    One scan walks both networks side by side and compares their attention maps layer by layer.

    Args:
      network: the network.
      sums: what was added so far.
      before: params before the task.
      after: params after it.
      batch: token rows.
    """
    context = network.context(batch)
    probe = Probe(_all_rows)

    def body(inputs: tuple[Array, Array], layers: tuple[Params, Params]) -> tuple[tuple[Array, Array], Array]:
        (x, x_probs), (y, y_probs) = (
            network.block(layer, state, batch, context=context, probe=probe)
            for layer, state in zip(layers, inputs, strict=True)
        )
        # Weights of pairs that are not visible are 0 in both.
        return (x, y), jnp.sum(jnp.square(x_probs - y_probs), axis=(0, 2, 3))

    start = network.embed(before, batch), network.embed(after, batch)
    squares = jax.lax.scan(body, start, (network.blocks(before), network.blocks(after)))[1]
    return HeadSums(sums.total + squares, sums.triples + _pairs(network, batch))


def normalise_sensitivity(sensitivity: Heads) -> Heads:
    """Scaled so that the heads of each layer sum to 1; a layer of zeros stays."""
    total = jnp.sum(sensitivity, axis=-1, keepdims=True)
    return sensitivity / jnp.where(total == 0, 1.0, total)


def combine(
    sensitivity: Float[Array, "tasks layers heads"],
    forgettability: Float[Array, "tasks layers heads"],
    how: Importance,
    key: Array | None = None,
) -> Heads:
    """Importance of heads over the tasks so far (SEEKR, equation 5).

    Args:
      sensitivity: normalised, by task; zeros for tasks to come.
      forgettability: by task; zeros for tasks to come.
      how: `product_of_sums` is the paper's, `sum_of_products` that of the authors' code; `sensitivity` and
        `forgettability` take one of the two alone; `random` draws from [0, 1) and looks at neither.
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
        "sum_of_products": lambda: jnp.sum(sensitivity * forgettability, axis=0),
        "sensitivity": lambda: jnp.sum(sensitivity, axis=0),
        "forgettability": lambda: jnp.sum(forgettability, axis=0),
    }
    if how == "random":
        if key is None:
            raise ValueError("key: random importance needs one to draw from")
        return jax.random.uniform(key, sensitivity.shape[1:])
    return rules[how]()


def resolve_budget(budget: int | float, total: int) -> int:
    """A budget as a number: integers stand for themselves, fractions for a share of `total`, at least 1.

    Examples:
      >>> resolve_budget(24, 32), resolve_budget(0.75, 32), resolve_budget(0.01, 32)
      (24, 24, 1)

    Raises:
      ValueError: below 1 (0 as a fraction), or over `total`.
    """
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(f"{budget} is no share: allowed are above 0 to 1.0, or a whole number from 1 to {total}")
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
      per_layer: at most so many heads of a layer; static. The paper sets no such limit.

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


def _all_rows(view: AttentionView, _: Any) -> Float[Array, "batch heads query length"]:
    batch, length, heads, _ = view.query.shape
    every_head = jnp.broadcast_to(jnp.arange(heads), (batch, heads))
    every_query = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return selected_rows(view, every_head, every_query)


def _pairs(network: Network, batch: Batch) -> Float[Array, ""]:
    return jnp.sum(visible(batch.segments, network.causal).astype(jnp.float32))
