"""ModernBERT. `local_attention` counts both sides of a window; layers may be given by the distance of full ones."""

from __future__ import annotations

from typing import Any

from jaxcl.errors import UserError
from jaxcl.models.modernbert import ModernBertConfig
from jaxcl.weights.families.base import ACTIVATIONS, Family, Fields, HfConfig
from jaxcl.weights.families.rope import FULL, WINDOW, read_rope
from jaxcl.weights.tables import MODERNBERT

_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_length",
    "norm_eps": "norm_eps",
    "norm_bias": "norm_bias",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "classifier_bias": "head_bias",
    "decoder_bias": "vocab_bias",
    "classifier_pooling": "pooling",
    "attention_dropout": "attention_dropout",
    "initializer_range": "init_std",
}
_DROPOUT = ("embedding_dropout", "mlp_dropout", "classifier_dropout")
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "classifier_pooling": "cls",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "local_attention": 128,
}


def _read(config: HfConfig) -> Fields:
    config.refuse("tie_word_embeddings", True)
    fields: Fields = {"architecture": "modernbert"} | {field: config.need(key) for key, field in _KEYS.items()}
    fields["activation"] = config.activation("hidden_activation", "gelu")
    fields["head_activation"] = config.activation("classifier_activation", "gelu")
    rates = {key: config.get(key, 0.0) for key in _DROPOUT}
    if len(set(rates.values())) > 1:
        given = ", ".join(f"{key}={rate}" for key, rate in rates.items())
        raise UserError(f"{config.where}: {given} is not supported; allowed is one value for all three")
    fields["hidden_dropout"] = rates[_DROPOUT[0]]
    layers = fields["num_layers"]
    every = config.get("global_attn_every_n_layers", 3)
    types = config.get("layer_types") or [WINDOW if layer % every else FULL for layer in range(layers)]
    if unknown := sorted(set(types) - {FULL, WINDOW}):
        raise UserError(f"{config.where}: layer_types: {unknown[0]} is not supported; allowed are {FULL}, {WINDOW}")
    if len(types) != layers:
        raise UserError(f"{config.where}: layer_types has {len(types)} entries for {layers} layers")
    fields["layer_types"] = tuple("window" if kind == WINDOW else "full" for kind in types)
    # As many keys on either side, and the query's own.
    fields["window"] = config.need("local_attention") // 2 + 1
    theta, local = config.get("global_rope_theta", 160_000.0), config.get("local_rope_theta", 10_000.0)
    rope = read_rope(config, theta=theta, window_theta=local)
    if rope.pop("rope_scaling") is not None:
        raise UserError(f"{config.where}: scaled rotary positions are not supported in modernbert")
    return fields | rope


def _write(config: ModernBertConfig) -> Fields:
    local = config.rope_theta if config.window_rope_theta is None else config.window_rope_theta
    kinds = [WINDOW if own else FULL for own in config.windowed]
    return {
        **{key: getattr(config, field) for key, field in _KEYS.items()},
        **dict.fromkeys(_DROPOUT, config.hidden_dropout),
        "hidden_activation": ACTIVATIONS[config.activation][0],
        "classifier_activation": ACTIVATIONS[config.head_activation][0],
        # Without layers that have a window, any number says the same.
        "local_attention": 2 * (config.window - 1) if config.window else _DEFAULTS["local_attention"],
        "tie_word_embeddings": True,
        # In the words of newer releases, and of older ones where these know such layers.
        "layer_types": kinds,
        **_every(kinds),
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": local,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": config.rope_theta},
            WINDOW: {"rope_type": "default", "rope_theta": local},
        },
    }


def _every(kinds: list[str]) -> Fields:
    """The distance of layers that attend to everything, where it is the same throughout."""
    distances = range(1, len(kinds) + 1)
    found = [n for n in distances if kinds == [WINDOW if layer % n else FULL for layer in range(len(kinds))]]
    return {"global_attn_every_n_layers": found[0]} if found else {}


FAMILIES = (Family("modernbert", "ModernBert", _read, _write, MODERNBERT, _DEFAULTS, head="ForMaskedLM"),)
