"""A tiny model of every family as the `config.json` of transformers, and variants of its switches."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from jaxcl.models.network import ModelConfig, Network
from jaxcl.weights.hf_config import from_hf

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
# Windows are shorter than the rows of the tests; layers of all kinds are among the first two.
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.5, 2.0, 4.0, 8.0],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 16},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "ministral": {"model_type": "ministral", "sliding_window": 5, "head_dim": 16, **_MIXED},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5},
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 5, **_MIXED},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 5,
        **_MIXED,
        "rope_parameters": {
            "full_attention": YARN | {"rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "phi3": {
        "model_type": "phi3",
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 8,
        "rope_parameters": LONGROPE | {"rope_theta": 1e4},
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 1.5,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 3,  # no expert is without tokens in a test
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
    },
    "olmoe": {"model_type": "olmoe", "num_local_experts": 4, "num_experts_per_tok": 3},
}
"""Keys by family, beyond `SIZES`."""

VARIANTS: dict[str, dict[str, Any]] = {
    "llama-dynamic": DECODERS["llama"]
    | {
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
    },
    "llama-yarn": DECODERS["llama"] | {"rope_parameters": YARN | {"rope_theta": 1e4}},
    "llama-yarn-old-style": DECODERS["llama"] | {"rope_theta": 3e4, "rope_scaling": YARN | {"attention_factor": 1.3}},
    "llama-yarn-mscale": DECODERS["llama"]
    | {
        "rope_parameters": YARN | {"rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    },
    "llama-3-old-style": DECODERS["llama"]
    | {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral-without-window": {"model_type": "mistral", "sliding_window": None},
    "ministral-all": {"model_type": "ministral", "sliding_window": 5, "head_dim": 8},
    "qwen2-without-window": {"model_type": "qwen2"},
    "qwen3-biases-window": {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "gemma2-without-caps": DECODERS["gemma2"] | {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    "gemma3-old-style": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "rope_theta": 5e4,
        "rope_local_base_freq": 2e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3-biases": DECODERS["gemma3_text"] | {"attention_bias": True, "query_pre_attn_scalar": 10},
    "olmo2-biases": {"model_type": "olmo2", "attention_bias": True, "num_key_value_heads": 4},
    "olmo3-old-style": {
        "model_type": "olmo3",
        "sliding_window": 5,
        "num_hidden_layers": 4,
        "rope_theta": 5e5,
        "rope_scaling": YARN,
    },
    "smollm3-window": {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 5,
        "no_rope_layer_interval": 3,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "phi3-window": {"model_type": "phi3", "sliding_window": 5},
    "phi-4-mini": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 2.0, 2.1, 3.0],
            "long_factor": [1.5, 2.0, 4.0, 8.0, 9.0, 9.5],
        },
    },
    "qwen3_moe-window": DECODERS["qwen3_moe"]
    | {
        "use_sliding_window": True,
        "sliding_window": 5,
        "attention_bias": True,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.02,
    },
    "olmoe-all-experts": DECODERS["olmoe"]
    | {"num_experts_per_tok": 4, "num_key_value_heads": 4, "norm_topk_prob": True, "attention_bias": True},
    "granite-biases": DECODERS["granite"] | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
}
"""Further switches, and both styles of `config.json`."""

EVERY = DECODERS | VARIANTS

ENCODERS: dict[str, dict[str, Any]] = {"eurobert": {"model_type": "eurobert", "head_dim": 16, "attention_bias": True}}

_MODERNBERT = {"model_type": "modernbert", "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}
_DEBERTA = {
    "model_type": "deberta-v2",
    "relative_attention": True,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
OWN_MODELS: dict[str, dict[str, Any]] = {
    "modernbert": _MODERNBERT,
    "modernbert-switches": _MODERNBERT
    | {
        "num_hidden_layers": 4,
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 900.0,
        "local_rope_theta": 40.0,
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
        "decoder_bias": False,
        "classifier_pooling": "mean",
        **dict.fromkeys(("embedding_dropout", "mlp_dropout", "classifier_dropout"), 0.1),
        "attention_dropout": 0.2,
        "classifier_activation": "silu",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "modernbert-layer-types": _MODERNBERT
    | {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
        },
    },
    "deberta-v2": _DEBERTA | {"position_buckets": 8, "max_relative_positions": -1, "max_position_embeddings": 12},
    "deberta-v2-new-head": _DEBERTA
    | {"position_buckets": 4, "max_relative_positions": 10, "hidden_act": "relu", "legacy": False},
    "deberta-v2-no-buckets": _DEBERTA
    | {"position_buckets": -1, "max_relative_positions": 5, "pooler_hidden_act": "relu", "pos_att_type": "c2p|p2c"},
}
"""Encoders that are a model of their own, and variants of their switches."""

SWITCHES = {
    "causal",
    "family",
    "layer_types",
    "window",
    "rotary_layers",
    "window_rope_theta",
    "rotary_share",
    "norm_placement",
    "norm_scale",
    "qk_norm",
    "attention_out_bias",
    "embedding_scale",
    "attention_scale",
    "residual_scale",
    "logit_divisor",
    "attention_cap",
    "logit_cap",
    "num_experts",
    "experts_per_token",
    "expert_size",
    "normalise_top_k",
    "router_loss_weight",
}
"""Fields that LLaMA leaves alone; some family sets each."""


_CONFIG: TypeAdapter[Any] = TypeAdapter(ModelConfig)


def content(name: str) -> dict[str, Any]:
    """The `config.json` of a tiny model."""
    return SIZES | (EVERY | ENCODERS | OWN_MODELS)[name]


def config_of(name: str, **changes: Any) -> Any:
    """Its model configuration."""
    return _CONFIG.validate_python({**from_hf(content(name), "config.json"), **changes})


def network_of(name: str, **changes: Any) -> Network:
    return Network.create(config_of(name, **changes))
