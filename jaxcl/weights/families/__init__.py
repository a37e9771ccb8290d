"""The families of checkpoints that jaxcl reads and writes, by `model_type`; a file of this folder each.

A family is data: keys of `config.json` to fields of the model configuration, and names of tensors to params. What all
families compute is one decoder and a few encoders (`jaxcl.models`), whose switches these fields are.
"""

from __future__ import annotations

from jaxcl.errors import UserError
from jaxcl.models.roberta import RobertaConfig
from jaxcl.weights.families import (
    deberta,
    encoders,
    experts,
    gemma,
    granite,
    llama,
    mistral,
    modernbert,
    olmo,
    phi3,
    qwen,
    smollm3,
    smolvlm,
)
from jaxcl.weights.families.base import Config, Family

_FILES = (llama, mistral, qwen, gemma, olmo, smollm3, phi3, granite, experts, smolvlm, encoders, modernbert, deberta)
FAMILIES: dict[str, Family] = {family.model_type: family for file in _FILES for family in file.FAMILIES}
"""Every family by its `model_type`."""

MISSING = {
    "qwen3_next": "gated delta nets in place of attention",
    "qwen3_5": "gated delta nets in place of attention",
    "qwen2_moe": "experts that all tokens share",
    "gemma3n": "per-layer embeddings",
    "gemma4": "per-layer embeddings and keys that layers share",
    "gpt_oss": "attention sinks and a clamped SwiGLU",
    "llama4": "experts that all tokens share, and attention in chunks",
    "mixtral": "experts whose tensors have names of their own",
    "granitemoe": "experts whose tensors have names of their own",
    "phimoe": "a router that draws its experts",
    "phi": "attention and feed-forward part side by side",
    "gpt2": "learned positions in a decoder",
    "gpt_neox": "attention and feed-forward part side by side",
    "falcon": "attention and feed-forward part side by side",
    "cohere": "attention and feed-forward part side by side",
    "cohere2": "attention and feed-forward part side by side",
    "deepseek_v2": "latent attention",
    "deepseek_v3": "latent attention",
    "mamba": "state-space layers",
    "mamba2": "state-space layers",
    "granitemoehybrid": "state-space layers",
    "deberta": "attention by distances without buckets, and queries, keys and values in one projection",
    "t5": "a decoder that reads an encoder",
}
"""What families that are not here need and the decoder and the encoder lack."""


def find_family(model_type: str, where: str) -> Family:
    """The family of a `model_type`.

    Args:
      model_type: as in `config.json`.
      where: the file, for messages.

    Raises:
      UserError: jaxcl does not know it, or lacks what it needs.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in MISSING:
        raise UserError(f"{where}: model_type={model_type} is not supported: it needs {MISSING[model_type]}")
    raise UserError(f"{where}: model_type={model_type} is not supported; allowed are {', '.join(FAMILIES)}")


def family_of(config: Config) -> Family:
    """The family that a model is read from and written as.

    Raises:
      UserError: `model.family` is not one of them.
    """
    if isinstance(config, RobertaConfig):
        return FAMILIES[config.family or ("bert" if encoders.is_bert(config) else "roberta")]
    return find_family(config.family, "model.family")
