"""How much a network's attention heads matter to a task, by block of attention: words or images on words or images.

The measures are those of `jaxcl.methods.passes.heads`, summed within each block (`jaxcl.functional.BLOCKS`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcl.functional.attention_rows import attention_maps
from jaxcl.functional.heads import HeadSums
from jaxcl.functional.modalities import BLOCKS, block_masks, block_squares, watch_blocks
from jaxcl.methods.passes.losses import example_losses
from jaxcl.models.batch import Batch
from jaxcl.models.mask import visible
from jaxcl.models.network import Layer, Network, Params
from jaxcl.models.probe import Probe, Tap


def no_block_sums(network: Network) -> HeadSums:
    """Nothing yet: totals `[blocks, layers, heads]`."""
    blocks = len(BLOCKS)
    return HeadSums(jnp.zeros((blocks, network.num_layers, network.num_heads)), jnp.zeros((blocks, 1, 1)))


@jax.named_scope("importance")
def add_block_sensitivity(network: Network, sums: HeadSums, params: Params, batch: Batch, chunk: int) -> HeadSums:
    """`add_sensitivity` by block.

    Args:
      network: the network.
      sums: what was added so far.
      params: the network's params.
      batch: token rows.
      chunk: see `over_positions`; static.
    """
    compute = network.config.compute.model_copy(update={"remat": "full"})
    network = Network.create(network.config.model_copy(update={"compute": compute}))
    modality = _modality(batch)

    def loss(dummy: Array) -> Array:
        tap = Tap(lambda probs, seen, one: watch_blocks(probs, seen, modality, one), dummy)
        states = network.hidden(params, batch, tap=tap).states
        return jnp.sum(example_losses(network, params, states, batch, chunk))

    squares = jax.grad(loss)(jnp.zeros((network.num_layers, len(BLOCKS), network.num_heads)))
    return sums.add(squares.swapaxes(0, 1), _pairs(network, batch))


@jax.named_scope("importance")
def add_block_forgettability(network: Network, sums: HeadSums, before: Params, after: Params, batch: Batch) -> HeadSums:
    """`add_forgettability` by block.

    Args:
      network: the network.
      sums: what was added so far.
      before: params before the task.
      after: params after it.
      batch: token rows.
    """
    context, modality = network.context(batch), _modality(batch)
    probe = Probe(lambda view, _: attention_maps(view))

    def body(inputs: tuple[Array, Array], layers: tuple[Layer, Layer]) -> tuple[tuple[Array, Array], Array]:
        (x, x_probs), (y, y_probs) = (
            network.block(layer, state, batch, context=context, probe=probe)
            for layer, state in zip(layers, inputs, strict=True)
        )
        return (x, y), block_squares(jnp.square(x_probs - y_probs), modality)

    start = network.embed(before, batch), network.embed(after, batch)
    squares = jax.lax.scan(body, start, (network.blocks(before), network.blocks(after)))[1]
    return sums.add(squares.swapaxes(0, 1), _pairs(network, batch))


def whole(sums: HeadSums) -> HeadSums:
    """The sums over all blocks, `[layers, heads]`."""
    return HeadSums(jnp.sum(sums.total, axis=0), jnp.sum(sums.triples, axis=0))


def _modality(batch: Batch) -> Array:
    return jnp.zeros_like(batch.tokens) if batch.modality is None else batch.modality


def _pairs(network: Network, batch: Batch) -> Float[Array, "blocks layers 1"]:
    """Number of visible (query, key) pairs in each block; one layer stands for all where all see alike."""
    blocks = block_masks(_modality(batch))

    def count(window: int | None) -> Array:
        seen = visible(batch.segments, network.causal, window)
        return jnp.sum((blocks & seen).astype(jnp.float32), axis=(1, 2, 3, 4))[:, None, None]

    windowed, window = network.windowed(batch.tokens.shape[1]), network.config.window
    if len(set(windowed)) == 1:
        return count(window if windowed[0] else None)
    return jnp.where(np.array(windowed)[:, None], count(window), count(None))
