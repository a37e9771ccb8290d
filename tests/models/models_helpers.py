"""Tiny networks and batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.models.batch import Batch
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network, Params
from jaxcl.models.roberta import RobertaConfig

VOCAB = 17


def llama(**changes: Any) -> Network:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 12,
        "intermediate_size": 10,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "init_std": 0.4,
        "num_labels": 3,
    }
    return Network.create(LlamaConfig(**{**values, **changes}))


def roberta(**changes: Any) -> Network:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 12,
        "intermediate_size": 10,
        "num_layers": 2,
        "num_heads": 3,
        "max_length": 40,
        "init_std": 0.4,
        "num_labels": 3,
    }
    return Network.create(RobertaConfig(**{**values, **changes}))


BUILDERS = {"llama": llama, "roberta": roberta}


def params_of(network: Network, seed: int = 0) -> Params:
    """Fresh params, with noise on what starts at 0 or 1 so that a forgotten bias or scale shows."""
    fresh = network.init(jax.random.key(seed))
    leaves, structure = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def batch_of(segments: np.ndarray | list[list[int]], tokens: np.ndarray | None = None, **fields: Any) -> Batch:
    """A batch with the given segments; positions count from 0 within each segment."""
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


def row_losses(network: Network, params: Params, batch: Batch, **arguments: Any) -> jax.Array:
    """Summed cross-entropy of each row."""
    states = network.hidden(params, batch, **arguments).states
    scores = jax.nn.log_softmax(network.logits(params, states))
    picked = jnp.take_along_axis(scores, batch.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * batch.weights, axis=1)
