"""Mistral, all of whose layers have the window if any has, and Ministral, whose layers may differ."""

from jaxcl.weights.families.decoder import decoder, every
from jaxcl.weights.tables import decoder_table

_DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}


FAMILIES = (
    decoder("mistral", "Mistral", decoder_table(), defaults=_DEFAULTS, pattern=every, types=False),
    decoder("ministral", "Ministral", decoder_table(), defaults=_DEFAULTS, pattern=every),
)
