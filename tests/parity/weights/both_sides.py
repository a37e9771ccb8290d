"""Models that both sides know, one batch for them, and the comparison of their outputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxcl.models.batch import Batch
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network, Params
from jaxcl.models.roberta import RobertaConfig
from jaxcl.weights.tree import flatten, unflatten

TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}
ROWS, LENGTH, PAD = 3, 12, 1
LENGTHS = np.array([12, 7, 9])
REAL = np.arange(LENGTH) < LENGTHS[:, None]


_DECODER = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 28, "num_layers": 3, "num_heads": 4}
_ENCODER = _DECODER | {"max_length": 38}
_BERT = {"position_offset": 0, "type_vocab_size": 2, "pad_id": PAD, "layer_norm_eps": 1e-12}
OURS: dict[str, LlamaConfig | RobertaConfig] = {
    "llama": LlamaConfig(**_DECODER, num_kv_heads=2, head_dim=16, max_length=64),
    "llama-switches": LlamaConfig(
        **_DECODER,
        max_length=64,
        tie_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_theta=5e5,
        norm_eps=1e-3,
        rope_scaling={"type": "llama3", "factor": 8.0, "original_max_length": 16},
    ),
    "llama-linear": LlamaConfig(**_DECODER, max_length=64, rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-labels": LlamaConfig(**_DECODER, max_length=64, num_labels=3),
    "roberta": RobertaConfig(**_ENCODER, activation="gelu_tanh"),
    "roberta-labels": RobertaConfig(**_ENCODER, num_labels=4, layer_norm_eps=1e-3),
    "bert": RobertaConfig(**_ENCODER, **_BERT),
    "bert-labels": RobertaConfig(**_ENCODER, **_BERT, num_labels=4, activation="relu", head_activation="relu"),
}
AUTO = {
    "llama": transformers.AutoModelForCausalLM,
    "roberta": transformers.AutoModelForMaskedLM,
    "bert": transformers.AutoModelForMaskedLM,
}


def random_params(network: Network) -> Params:
    rng = np.random.default_rng(1)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(size=leaf.shape, scale=0.3) + path.endswith("scale"), leaf.dtype)

    return unflatten({path: draw(path, leaf) for path, leaf in flatten(network.shapes()).items()})


def tokens() -> np.ndarray:
    rows = np.random.default_rng(0).integers(5, 50, size=(ROWS, LENGTH))
    return np.where(REAL, rows, PAD).astype(np.int32)


def types(config: Any) -> np.ndarray:
    halves = np.broadcast_to(np.arange(LENGTH) > 4, (ROWS, LENGTH)) & REAL
    return (halves * (getattr(config, "type_vocab_size", 1) > 1)).astype(np.int32)


def batch(config: Any) -> Batch:
    ones = jnp.ones((ROWS, LENGTH))
    return Batch(
        tokens=jnp.asarray(tokens()),
        segments=jnp.asarray(REAL.astype(np.int32)),
        positions=jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH)),
        predict=None,
        targets=jnp.asarray(tokens()),
        weights=ones,
        task=jnp.zeros(ROWS, jnp.int32),
        example=jnp.zeros(ROWS, jnp.int32),
        types=jnp.asarray(types(config)),
    )


def outputs_of_transformers(model: torch.nn.Module) -> dict[str, np.ndarray]:
    inputs = {
        "input_ids": torch.tensor(tokens().astype(np.int64)),
        "attention_mask": torch.tensor(REAL.astype(np.int64)),
    }
    if model.config.model_type in ("bert", "roberta", "xlm-roberta"):
        inputs["token_type_ids"] = torch.tensor(types(model.config).astype(np.int64))
    with torch.no_grad():
        out = model(**inputs)
    fields = ("logits", "prediction_logits", "last_hidden_state")
    return {field: out[field].numpy() for field in fields if field in out}


def check(found: dict[str, np.ndarray], network: Network, params: Params) -> None:
    """Holds what transformers gave against jaxcl's network."""
    assert found
    given = batch(network.config)
    states = jax.jit(lambda p: network.hidden(p, given).states)(params)
    for field, values in found.items():
        if field == "last_hidden_state":
            ours = np.asarray(states)
        elif values.ndim == 2:
            ours = np.asarray(network.classify(params, states, given))
        else:
            ours = np.asarray(network.logits(params, states))
        assert np.std(values) > 1e-2
        rows = REAL if values.ndim == 3 else np.ones(ROWS, bool)
        np.testing.assert_allclose(ours[rows], values[rows], **TOLERANCE)
