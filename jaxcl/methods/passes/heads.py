r"""How much a network's attention heads matter to a task (SEEKR, section 3.2).

Neither measure holds an attention map longer than its layer, and both count real, visible (query, key) pairs only; the
authors' code counts padding and future keys too.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcl.functional.attention_rows import attention_maps
from jaxcl.functional.heads import HeadSums, watch
from jaxcl.methods.passes.losses import example_losses
from jaxcl.models.batch import Batch
from jaxcl.models.mask import visible
from jaxcl.models.network import Layer, Network, Params
from jaxcl.models.probe import Probe, Tap


@jax.named_scope("importance")
def add_sensitivity(network: Network, sums: HeadSums, params: Params, batch: Batch, chunk: int) -> HeadSums:
    """Adds a batch to the mean square of d(loss) / d(attention weight) (SEEKR, equation 3).

    The loss of an example is its own mean over its scored positions, so how examples are put into batches changes
    nothing. Layers are rematerialised whatever the configuration says: the backward pass then holds the attention
    maps of one layer at a time.

    Args:
      network: the network.
      sums: what was added so far.
      params: the network's params.
      batch: token rows.
      chunk: see `over_positions`; static.
    """
    squares = watched_squares(network, params, batch, chunk, Tap(watch, jnp.zeros_like(sums.total)))
    return sums.add(squares, visible_pairs(network, batch, jnp.sum))


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
    # Weights of pairs that are not visible are 0 in both.
    squares = changed_squares(network, before, after, batch, lambda squares: jnp.sum(squares, axis=(0, 2, 3)))
    return sums.add(squares, visible_pairs(network, batch, jnp.sum))


def watched_squares(network: Network, params: Params, batch: Batch, chunk: int, tap: Tap) -> Float[Array, "layers ..."]:
    """Sums of the squares of d(loss) / d(attention weight).

    Args:
      network: the network.
      params: the network's params.
      batch: token rows.
      chunk: see `over_positions`; static.
      tap: a function as `watch` is, and zeros for each layer, whose gradient is the result.
    """
    compute = network.config.compute.model_copy(update={"remat": "full"})
    network = Network.create(network.config.model_copy(update={"compute": compute}))

    def loss(dummy: Array) -> Array:
        states = network.hidden(params, batch, tap=Tap(tap.function, dummy)).states
        return jnp.sum(example_losses(network, params, states, batch, chunk))

    return jax.grad(loss)(tap.inputs)


def changed_squares(
    network: Network, before: Params, after: Params, batch: Batch, over: Callable[[Array], Array]
) -> Float[Array, "layers ..."]:
    """Sums of the squared change of attention weights.

    Args:
      network: the network.
      before: params before the task.
      after: params after it.
      batch: token rows.
      over: sums the squares of a layer, `[batch, heads, query, length]`.
    """
    context = network.context(batch)
    probe = Probe(lambda view, _: attention_maps(view))

    def body(inputs: tuple[Array, Array], layers: tuple[Layer, Layer]) -> tuple[tuple[Array, Array], Array]:
        (x, x_probs), (y, y_probs) = (
            network.block(layer, state, batch, context=context, probe=probe)
            for layer, state in zip(layers, inputs, strict=True)
        )
        return (x, y), over(jnp.square(x_probs - y_probs))

    start = network.embed(before, batch), network.embed(after, batch)
    return jax.lax.scan(body, start, (network.blocks(before), network.blocks(after)))[1]


def visible_pairs(
    network: Network, batch: Batch, over: Callable[[Array], Array]
) -> Float[Array, "..."] | Float[Array, "... layers 1"]:
    """Number of visible (query, key) pairs; by layer where some have a window and others have not.

    Args:
      network: the network.
      batch: token rows.
      over: sums `[batch, 1, length, length]`, 1 for pairs that are visible and else 0.
    """

    def count(window: int | None) -> Array:
        return over(visible(batch.segments, network.causal, window).astype(jnp.float32))

    windowed, window = network.windowed(batch.tokens.shape[1]), network.config.window
    if len(set(windowed)) == 1:
        return count(window if windowed[0] else None)
    return jnp.where(np.array(windowed)[:, None], count(window), count(None))
