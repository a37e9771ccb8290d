"""OLMo 2 and 3: norms after the branches, and norms of queries and keys over all heads at once."""

from __future__ import annotations

from typing import Any

from jaxcl.models.llama_config import LlamaConfig
from jaxcl.weights.families.base import Fields
from jaxcl.weights.families.decoder import decoder, every_nth_full
from jaxcl.weights.families.rope import FULL, WINDOW, write_scaling
from jaxcl.weights.tables import POST_NORMS, decoder_table

_TABLE = decoder_table(POST_NORMS, flat_norms=True)
_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-5, "attention_bias": False}
_SWITCHES = {"norm_placement": "post", "qk_norm": "flat"}


def _write(config: LlamaConfig) -> Fields:
    # Newer releases read the first key; of `rope_theta` alone they would take the default in layers with a window.
    scaling = {"rope_type": "default"} if config.rope_scaling is None else write_scaling(config.rope_scaling)
    local = config.window_rope_theta or config.rope_theta
    return {
        "rope_parameters": {
            FULL: scaling | {"rope_theta": config.rope_theta},
            WINDOW: {"rope_type": "default", "rope_theta": local},
        }
    }


FAMILIES = (
    decoder(
        "olmo2",
        "Olmo2",
        _TABLE,
        defaults=_DEFAULTS,
        switches=_SWITCHES,
        keys={"attention_bias": "attention_bias"},
    ),
    decoder(
        "olmo3",
        "Olmo3",
        _TABLE,
        defaults=_DEFAULTS | {"sliding_window": 4096},
        switches=_SWITCHES,
        keys={"attention_bias": "attention_bias"},
        theta=500_000.0,
        window_theta=500_000.0,
        pattern=lambda config: every_nth_full(config, 4),
        write=_write,
    ),
)
