"""LLaMA 1 to 3.x, Vicuna, SmolLM2, TinyLlama."""

from jaxcl.weights.families.decoder import decoder
from jaxcl.weights.tables import decoder_table

FAMILIES = (
    decoder(
        "llama",
        "Llama",
        decoder_table(),
        defaults={"attention_bias": False, "mlp_bias": False},
        keys={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    ),
)
