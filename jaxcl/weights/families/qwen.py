"""Qwen 2, 2.5 and 3. The window, where it is used at all, begins at layer `max_window_layers`."""

from __future__ import annotations

from jaxcl.models.llama_config import LlamaConfig
from jaxcl.weights.families.base import Fields, HfConfig
from jaxcl.weights.families.decoder import decoder
from jaxcl.weights.families.rope import FULL, WINDOW
from jaxcl.weights.tables import decoder_table

_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _pattern(config: HfConfig) -> list[str]:
    first = config.need("max_window_layers")
    return [WINDOW if layer >= first else FULL for layer in range(config.need("num_hidden_layers"))]


def _read(config: HfConfig) -> Fields:
    return {} if config.get("use_sliding_window") else {"layer_types": ("full",), "window": 0}


def _write(config: LlamaConfig) -> Fields:
    return {"use_sliding_window": bool(config.window), "max_window_layers": config.windowed.count(False)}


FAMILIES = (
    decoder(
        "qwen2",
        "Qwen2",
        decoder_table(),
        defaults=_DEFAULTS,
        # Hard-coded there, not in config.json.
        switches={"attention_bias": True, "attention_out_bias": False},
        pattern=_pattern,
        read=_read,
        write=_write,
    ),
    decoder(
        "qwen3",
        "Qwen3",
        decoder_table(),
        defaults=_DEFAULTS | {"head_dim": 128, "attention_bias": False},
        switches={"qk_norm": "head"},
        keys={"attention_bias": "attention_bias"},
        pattern=_pattern,
        read=_read,
        write=_write,
    ),
)
