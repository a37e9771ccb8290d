"""Tiny networks, and params for them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.batch import Batch
from jaxcl.models.deberta import DebertaConfig
from jaxcl.models.gates import Gates
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.modernbert import ModernBertConfig
from jaxcl.models.network import Network, Params
from jaxcl.models.roberta import RobertaConfig
from jaxcl.weights.tree import flatten, unflatten

VOCAB = 13
ALL_TARGETS = ("query", "key", "value", "out", "gate", "up", "down")


# ---------------------------------------------------------------- networks


def llama_config(**changes: Any) -> LlamaConfig:
    """Grouped key/value heads, two layers; weights so large that outputs depend on the text."""
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
    return LlamaConfig(**{**values, **changes})


def roberta_config(**changes: Any) -> RobertaConfig:
    """Without dropout."""
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
    return RobertaConfig(**{**values, **changes})


def tiny_llama(**changes: Any) -> Network:
    return Network.create(llama_config(**changes))


def tiny_roberta(**changes: Any) -> Network:
    return Network.create(roberta_config(**changes))


def llama(**changes: Any) -> Network:
    """A decoder whose heads are wider than hidden size / heads, with a layer that scores labels."""
    own = {"hidden_size": 12, "intermediate_size": 10, "head_dim": 4, "init_std": 0.4, "num_labels": 3}
    return tiny_llama(**{**own, **changes})


def roberta(**changes: Any) -> Network:
    """An encoder with dropout as published and a layer that scores labels."""
    own = {"hidden_size": 12, "intermediate_size": 10, "num_heads": 3, "max_length": 40, "init_std": 0.4}
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    return tiny_roberta(**{**own, **dropout, "num_labels": 3, **changes})


def modernbert(**changes: Any) -> Network:
    """An encoder with a layer of each kind, whose window is shorter than most rows, and dropout."""
    own = {"layer_types": ("full", "window"), "window": 3, "norm_bias": True, "head_bias": True, "num_labels": 3}
    sizes = {"vocab_size": VOCAB, "hidden_size": 12, "intermediate_size": 10, "num_layers": 2, "num_heads": 3}
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    return Network.create(ModernBertConfig(**{**own, **sizes, **dropout, "init_std": 0.4, "max_length": 32, **changes}))


def deberta(**changes: Any) -> Network:
    """An encoder with attention by distance, of which there are fewer buckets than distances in most rows."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 12, "intermediate_size": 10, "num_layers": 2, "num_heads": 3}
    own = {"position_buckets": 4, "max_distance": 9, "init_std": 0.4, "max_length": 32, "num_labels": 3}
    return Network.create(DebertaConfig(**{**sizes, **own, **changes}))


BUILDERS = {"llama": llama, "roberta": roberta, "modernbert": modernbert, "deberta": deberta}
# For tests of what all architectures share; the later ones are made of the parts of the first.
ARCHITECTURES = [
    "llama",
    "roberta",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("modernbert", "deberta")),
]

# Configurations that differ in what a checkpoint stores.
LLAMA = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_length": 64,
}
ROBERTA = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_layers": 3,
    "num_heads": 4,
    "max_length": 30,
}
BERT = {"position_offset": 0, "type_vocab_size": 2, "pad_id": 0, "layer_norm_eps": 1e-12}
ROPE = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_length": 32}
LORA = {"rank": 3, "alpha": 5.0}
CONFIGS: dict[str, LlamaConfig | RobertaConfig] = {
    "llama": LlamaConfig(**LLAMA),
    "llama-tied": LlamaConfig(**LLAMA, tie_embeddings=True, rope_theta=5e5, norm_eps=1e-6),
    "llama-biases": LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, rope_scaling=ROPE),
    "llama-linear-rope": LlamaConfig(**LLAMA, rope_scaling={"type": "linear", "factor": 2.0}, dropout=0.1),
    "llama-labels": LlamaConfig(**LLAMA, num_labels=3),
    "roberta": RobertaConfig(**ROBERTA),
    "roberta-labels": RobertaConfig(**ROBERTA, num_labels=2, activation="gelu_tanh", hidden_dropout=0.0),
    "bert": RobertaConfig(**ROBERTA, **BERT),
    "bert-labels": RobertaConfig(**ROBERTA, **BERT, num_labels=5, activation="relu", head_activation="relu"),
}


# ---------------------------------------------------------------- params


def init(network: Network, seed: int = 0) -> Any:
    return jax.jit(network.init)(jax.random.key(seed))


def perturbed(params: Any, scale: float, seed: int = 7) -> Any:
    """The params with normal noise of standard deviation `scale`."""
    return _perturbed(params, jnp.float32(scale), jax.random.key(seed))


@jax.jit  # of every leaf by itself would be compiled many times over
def _perturbed(params: Any, scale: Any, key: Any) -> Any:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = [
        leaf + (scale * jax.random.normal(key, leaf.shape, leaf.dtype)).astype(leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def params_of(network: Network, seed: int = 0) -> Params:
    """Fresh params, with noise on what starts at 0 or 1 so that a forgotten bias or scale shows."""
    return perturbed(init(network, seed), 0.2, seed + 1)


def random_params(network: Network, seed: int = 0, dtype: Any = None) -> Params:
    """Random everywhere, so that no bias or norm can be swapped unseen. NumPy draws them: nothing is compiled."""
    rng = np.random.default_rng(seed)
    flat = {
        path: jnp.asarray(rng.normal(size=leaf.shape, scale=0.5), leaf.dtype if dtype is None else dtype)
        for path, leaf in flatten(network.shapes()).items()
    }
    return unflatten(flat)


@functools.cache
def plain_params(network: Network, seed: int) -> Params:
    """Weights of standard deviation 0.2, scales of norms 1. NumPy draws them: nothing is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = np.ones(leaf.shape) if path.endswith("scale") else rng.normal(0, 0.2, leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return unflatten({path: draw(path, leaf) for path, leaf in flatten(network.shapes()).items()})


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


def assert_equal_bits(found: Params, expected: Params) -> None:
    found, expected = flatten(found), flatten(expected)
    assert list(found) == list(expected)
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path


# ---------------------------------------------------------------- what they compute


def row_losses(network: Network, params: Params, batch: Batch, **arguments: Any) -> jax.Array:
    """Summed cross-entropy of each row."""
    states = network.hidden(params, batch, **arguments).states
    scores = jax.nn.log_softmax(network.logits(params, states))
    picked = jnp.take_along_axis(scores, batch.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * batch.weights, axis=1)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
