"""Tiny networks with params that are random everywhere, so that no bias or norm can be swapped unseen."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network, Params
from jaxcl.models.roberta import RobertaConfig
from jaxcl.weights.tree import flatten, unflatten

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


def random_params(network: Network, seed: int = 0, dtype: Any = None) -> Params:
    rng = np.random.default_rng(seed)
    flat = {
        path: jax.numpy.asarray(rng.normal(size=leaf.shape, scale=0.5), leaf.dtype if dtype is None else dtype)
        for path, leaf in flatten(network.shapes()).items()
    }
    return unflatten(flat)


def assert_equal_bits(found: Params, expected: Params) -> None:
    found, expected = flatten(found), flatten(expected)
    assert list(found) == list(expected)
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path
