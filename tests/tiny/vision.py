"""Tiny models that see, as the `config.json` of transformers."""

from __future__ import annotations

from typing import Any

from tests.tiny.families import SIZES

IMAGE_TOKEN = 5
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
_WHOLE = {"scale_factor": 2, "image_token_id": IMAGE_TOKEN}
_TEXT = SIZES | {"model_type": "llama"}

SEEING: dict[str, dict[str, Any]] = {
    "smolvlm": {
        "model_type": "smolvlm",
        "text_config": _TEXT,
        "vision_config": _TOWER | {"model_type": "smolvlm_vision"},
        **_WHOLE,
    },
    # Sides that are not a power of 2, whose reciprocals are rounded.
    "idefics3": {
        "model_type": "idefics3",
        "text_config": _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "head_dim": 16},
        "vision_config": _TOWER | {"model_type": "idefics3_vision", "image_size": 42, "layer_norm_eps": 1e-3},
        **_WHOLE,
        "scale_factor": 3,
        "tie_word_embeddings": True,
    },
    "smolvlm-old-style": {
        "model_type": "smolvlm",
        "text_config": _TEXT
        | {"rope_theta": 3e4, "rms_norm_eps": 1e-3, "tie_word_embeddings": False, "hidden_act": "gelu"},
        "vision_config": _TOWER | {"hidden_act": "relu", "max_image_size": {"longest_edge": 28}},
        **_WHOLE,
        "tie_word_embeddings": False,
    },
}
"""Keys of `config.json` by name."""


def content(name: str) -> dict[str, Any]:
    """The `config.json` of a tiny model."""
    return SEEING[name]
