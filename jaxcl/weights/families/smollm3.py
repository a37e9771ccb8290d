"""SmolLM3: every fourth layer has no positions. `no_rope_layers` has a 1 for layers *with* them."""

from __future__ import annotations

from jaxcl.models.llama_config import LlamaConfig, along
from jaxcl.weights.families.base import Fields, HfConfig
from jaxcl.weights.families.decoder import decoder
from jaxcl.weights.families.rope import FULL, WINDOW
from jaxcl.weights.tables import decoder_table


def _rotated(config: HfConfig) -> tuple[bool, ...]:
    layers, interval = config.need("num_hidden_layers"), config.get("no_rope_layer_interval", 4)
    given = config.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(layers)]
    return tuple(bool(layer) for layer in given)


def _pattern(config: HfConfig) -> list[str]:
    return [FULL if rotated else WINDOW for rotated in _rotated(config)]


def _read(config: HfConfig) -> Fields:
    fields: Fields = {"rotary_layers": _rotated(config)}
    return fields | ({} if config.get("use_sliding_window") else {"layer_types": ("full",), "window": 0})


def _write(config: LlamaConfig) -> Fields:
    rotated = along(config.rotary_layers, config.num_layers)
    return {"no_rope_layers": [int(own) for own in rotated], "use_sliding_window": bool(config.window)}


FAMILIES = (
    decoder(
        "smollm3",
        "SmolLM3",
        decoder_table(),
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layer_interval": 4,
        },
        keys={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        theta=2_000_000.0,
        pattern=_pattern,
        read=_read,
        write=_write,
    ),
)
