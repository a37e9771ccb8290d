"""Gemma 1, 2 and the text part of 3: norms scale by 1 + w, embeddings by the root of their width."""

from __future__ import annotations

from typing import Any

from jaxcl.models.llama_config import LlamaConfig
from jaxcl.weights.families.base import Fields, HfConfig
from jaxcl.weights.families.decoder import decoder, every_nth_full
from jaxcl.weights.tables import SANDWICH_NORMS, decoder_table

_SWITCHES: dict[str, Any] = {"norm_scale": "one_plus"}
_SANDWICH = _SWITCHES | {"norm_placement": "sandwich"}
_DEFAULTS: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_bidirectional_attention": False,
}
_LATER = _DEFAULTS | {
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
_KEYS = {"attention_bias": "attention_bias"}
_CAPS = {"final_logit_softcapping": "logit_cap", "attn_logit_softcapping": "attention_cap"}
_REFUSED = {"use_bidirectional_attention": False}


def _read_first(config: HfConfig) -> Fields:
    fields: Fields = {"embedding_scale": config.need("hidden_size") ** 0.5}
    # Files of the first release say `gelu` and mean its approximation.
    return fields | ({"activation": "gelu_tanh"} if config.get("hidden_act") == "gelu" else {})


def _read(config: HfConfig) -> Fields:
    scale = config.need("query_pre_attn_scalar") ** -0.5
    return {"embedding_scale": config.need("hidden_size") ** 0.5, "attention_scale": scale}


def _write(config: LlamaConfig) -> Fields:
    return {"query_pre_attn_scalar": round(config.scale**-2)}


def _write_third(config: LlamaConfig) -> Fields:
    return _write(config) | {"rope_local_base_freq": config.window_rope_theta or config.rope_theta}


FAMILIES = (
    decoder(
        "gemma",
        "Gemma",
        decoder_table(),
        defaults=_DEFAULTS | {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16},
        switches=_SWITCHES,
        keys=_KEYS,
        refused=_REFUSED,
        read=_read_first,
    ),
    decoder(
        "gemma2",
        "Gemma2",
        decoder_table(SANDWICH_NORMS),
        defaults=_LATER | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        switches=_SANDWICH,
        keys=_KEYS | _CAPS,
        refused=_REFUSED,
        activation="hidden_activation",
        pattern=lambda config: every_nth_full(config, 2),
        read=_read,
        write=_write,
    ),
    decoder(
        "gemma3_text",
        "Gemma3",
        # The text part of files with a vision tower has names of its own.
        decoder_table(
            SANDWICH_NORMS,
            renamed=((r"^(model\.)?language_model\.(model\.)?", "model."), (r"^model\.lm_head\.", "lm_head.")),
            ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
        ),
        # Files with a vision tower leave out much of their text part.
        defaults=_LATER | {"max_position_embeddings": 131072, "vocab_size": 262208, "num_attention_heads": 8},
        switches=_SANDWICH | {"qk_norm": "head"},
        keys=_KEYS | _CAPS,
        refused=_REFUSED,
        activation="hidden_activation",
        theta=1_000_000.0,
        window_theta=10_000.0,
        pattern=lambda config: every_nth_full(config, config.get("sliding_window_pattern", 6)),
        read=_read,
        write=_write_third,
    ),
)
