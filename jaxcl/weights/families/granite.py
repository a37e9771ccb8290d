"""Granite 3: LLaMA with factors on embeddings, queries, residual branches and token scores."""

from jaxcl.weights.families.decoder import decoder
from jaxcl.weights.tables import decoder_table

_FACTORS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_divisor",
}

FAMILIES = (
    decoder(
        "granite",
        "Granite",
        decoder_table(),
        defaults={"attention_bias": False, "mlp_bias": False} | dict.fromkeys(_FACTORS, 1.0),
        keys={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias", **_FACTORS},
    ),
)
