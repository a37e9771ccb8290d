"""How much a network's attention heads matter to a task, by block of attention: words or images on words or images.

The measures are those of `jaxcl.methods.passes.heads`, summed within each block (`jaxcl.functional.BLOCKS`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcl.functional.heads import HeadSums
from jaxcl.functional.modalities import BLOCKS, block_squares, watch_blocks
from jaxcl.methods.passes.heads import changed_squares, visible_pairs, watched_squares
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network, Params
from jaxcl.models.probe import Tap


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
    modality = _modality(batch)
    tap = Tap(
        lambda probs, seen, dummy: watch_blocks(probs, seen, modality, dummy),
        jnp.zeros((network.num_layers, len(BLOCKS), network.num_heads)),
    )
    squares = watched_squares(network, params, batch, chunk, tap)
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
    over = functools.partial(block_squares, modality=_modality(batch))
    squares = changed_squares(network, before, after, batch, over)
    return sums.add(squares.swapaxes(0, 1), _pairs(network, batch))


def whole(sums: HeadSums) -> HeadSums:
    """The sums over all blocks, `[layers, heads]`."""
    return HeadSums(jnp.sum(sums.total, axis=0), jnp.sum(sums.triples, axis=0))


def _modality(batch: Batch) -> Array:
    return jnp.zeros_like(batch.tokens) if batch.modality is None else batch.modality


def _pairs(network: Network, batch: Batch) -> Float[Array, "blocks layers 1"]:
    """Number of visible (query, key) pairs in each block; all layers have one number where all see alike."""
    modality = _modality(batch)
    return visible_pairs(network, batch, lambda seen: block_squares(seen, modality)[..., None])
