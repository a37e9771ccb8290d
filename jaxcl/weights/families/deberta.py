"""DeBERTa-v3. Its `model_type` is that of DeBERTa-v2, whose convolution jaxcl lacks."""

from __future__ import annotations

from typing import Any

from jaxcl.errors import UserError
from jaxcl.models.deberta import DebertaConfig
from jaxcl.weights.families.base import ACTIVATIONS, Family, Fields, HfConfig
from jaxcl.weights.tables import DEBERTA

_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_length",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "init_std",
}
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-7,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
}
# What version 3 has. transformers' code reads other values of these keys for files that leave them out.
_FIXED: dict[str, tuple[Any, Any]] = {
    "relative_attention": (True, False),
    "share_att_key": (True, False),
    "norm_rel_ebd": ("layer_norm", "none"),
    "position_biased_input": (False, True),
    "type_vocab_size": (0, 0),
    "conv_kernel_size": (0, 0),
    "tie_word_embeddings": (True, True),
}
_DISTANCES = ("c2p", "p2c")


def _read(config: HfConfig) -> Fields:
    for key, (allowed, default) in _FIXED.items():
        if (value := config.get(key, default)) != allowed:
            raise UserError(f"{config.where}: {key}={value} is not supported; allowed is {allowed}, as in DeBERTa-v3")
    given = config.get("pos_att_type", [])
    kinds = [one.strip() for one in given.lower().split("|")] if isinstance(given, str) else list(given)
    if sorted(kinds) != sorted(_DISTANCES):
        raise UserError(f"{config.where}: pos_att_type={given} is not supported; allowed is {'|'.join(_DISTANCES)}")
    fields: Fields = {"architecture": "deberta"} | {field: config.need(key) for key, field in _KEYS.items()}
    width = fields["hidden_size"]
    for key in ("embedding_size", "pooler_hidden_size"):
        config.refuse(key, width)
    config.refuse("attention_head_size", width // fields["num_heads"])
    distance, buckets = config.get("max_relative_positions", -1), config.get("position_buckets", -1)
    return fields | {
        "max_distance": distance if distance > 0 else fields["max_length"],
        "position_buckets": max(buckets, 0),
        "activation": config.activation("hidden_act", "gelu"),
        "pooler_activation": config.activation("pooler_hidden_act", "gelu"),
    }


def _write(config: DebertaConfig) -> Fields:
    return {
        **{key: getattr(config, field) for key, field in _KEYS.items()},
        **{key: allowed for key, (allowed, _) in _FIXED.items()},
        "pos_att_type": list(_DISTANCES),
        "max_relative_positions": config.max_distance,
        "position_buckets": config.position_buckets or -1,
        "hidden_act": ACTIVATIONS[config.activation][0],
        "pooler_hidden_act": ACTIVATIONS[config.pooler_activation][0],
        "pooler_hidden_size": config.hidden_size,
        "legacy": True,  # the names of the masked-LM head that all releases know
    }


FAMILIES = (Family("deberta-v2", "DebertaV2", _read, _write, DEBERTA, _DEFAULTS, head="ForMaskedLM"),)
