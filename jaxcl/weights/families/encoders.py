"""RoBERTa, XLM-R and BERT; EuroBERT, which is a LLaMA whose positions see later ones."""

from __future__ import annotations

import functools

from jaxcl.errors import UserError
from jaxcl.models.llama_config import LlamaConfig
from jaxcl.models.roberta import RobertaConfig
from jaxcl.weights.families.base import ACTIVATIONS, Family, Fields, HfConfig
from jaxcl.weights.families.decoder import decoder
from jaxcl.weights.tables import BERT, ROBERTA, decoder_table


def is_bert(config: RobertaConfig) -> bool:
    """Whether an encoder's positions start at row 0 of the table, as in BERT."""
    return config.position_offset == 0


def _read(config: HfConfig, *, bert: bool, own: Fields | None = None) -> Fields:
    config.refuse("is_decoder", False)
    config.refuse("add_cross_attention", False)
    config.refuse("position_embedding_type", "absolute")
    config.refuse("tie_word_embeddings", True)
    activation = config.activation("hidden_act", "gelu")
    pad = config.get("pad_token_id", 0 if bert else 1)
    offset = 0 if bert else pad + 1
    return {
        "architecture": "roberta",
        **(own or {}),
        "vocab_size": config.need("vocab_size"),
        "hidden_size": config.need("hidden_size"),
        "intermediate_size": config.need("intermediate_size"),
        "num_layers": config.need("num_hidden_layers"),
        "num_heads": config.need("num_attention_heads"),
        "max_length": config.get("max_position_embeddings", 512) - offset,
        "position_offset": offset,
        "type_vocab_size": config.get("type_vocab_size", 2),
        "pad_id": pad,
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
        "activation": activation,
        "head_activation": activation if bert else "gelu",
        "hidden_dropout": config.get("hidden_dropout_prob", 0.1),
        "attention_dropout": config.get("attention_probs_dropout_prob", 0.1),
        "init_std": config.get("initializer_range", 0.02),
    }


def _write(config: RobertaConfig) -> Fields:
    bert = is_bert(config)
    if not bert and config.position_offset != config.pad_id + 1:
        raise UserError(
            f"model: transformers has no encoder with position_offset={config.position_offset} and "
            f"pad_id={config.pad_id}; allowed are 0 (BERT) and pad_id + 1 (RoBERTa)"
        )
    expected = config.activation if bert else "gelu"
    if config.head_activation != expected:
        raise UserError(
            f"model: transformers has no such encoder with head_activation={config.head_activation}; "
            f"allowed here is {expected}"
        )
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": ACTIVATIONS[config.activation][0],
        "max_position_embeddings": config.max_length + config.position_offset,
        "type_vocab_size": config.type_vocab_size,
        "pad_token_id": config.pad_id,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "tie_word_embeddings": True,
    }


def _write_eurobert(config: LlamaConfig) -> Fields:
    if config.num_labels:
        raise UserError(
            "model: the classifier of transformers' eurobert is another one; num_labels must be 0 to export"
        )
    return {}


FAMILIES = (
    Family(
        "xlm-roberta",
        "XLMRoberta",
        functools.partial(_read, bert=False, own={"family": "xlm-roberta"}),
        _write,
        ROBERTA,
        head="ForMaskedLM",
    ),
    decoder(
        "eurobert",
        "EuroBert",
        decoder_table(),
        defaults={"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False},
        switches={"causal": False},
        keys={"attention_bias": "attention_bias"},
        refused={"mlp_bias": False},  # would also be one of the output head
        head="ForMaskedLM",
        write=_write_eurobert,
    ),
    Family("roberta", "Roberta", functools.partial(_read, bert=False), _write, ROBERTA, head="ForMaskedLM"),
    Family("bert", "Bert", functools.partial(_read, bert=True), _write, BERT, head="ForMaskedLM"),
)
