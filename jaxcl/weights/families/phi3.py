"""Phi-3, Phi-4 and Phi-4-mini: fused projections in the file, longrope, a share of each head rotated."""

from __future__ import annotations

from jaxcl.models.llama_config import LlamaConfig
from jaxcl.weights.families.base import Fields, HfConfig
from jaxcl.weights.families.decoder import decoder, every
from jaxcl.weights.tables import decoder_table

_FUSED = {
    "self_attn.qkv_proj": ("attention/query", "attention/key", "attention/value"),
    "mlp.gate_up_proj": ("mlp/gate", "mlp/up"),
}


def _read(config: HfConfig) -> Fields:
    return {"dropout": config.get("resid_pdrop", 0.0), "attention_dropout": config.get("attention_dropout", 0.0)}


def _write(config: LlamaConfig) -> Fields:
    scaling = config.rope_scaling
    original = config.max_length if scaling is None else scaling.original_max_length
    return {"resid_pdrop": config.dropout_rates[0], "original_max_position_embeddings": original}


FAMILIES = (
    decoder(
        "phi3",
        "Phi3",
        decoder_table(fused=_FUSED),
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
        refused={"embd_pdrop": 0.0},
        partial=True,
        pattern=every,
        types=False,
        read=_read,
        write=_write,
    ),
)
