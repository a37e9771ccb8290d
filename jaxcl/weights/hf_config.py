"""From the `config.json` of a Hugging Face checkpoint to a model configuration, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcl.errors import UserError
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.roberta import RobertaConfig
from jaxcl.models.rotary import RopeScaling

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")

# transformers' names of the activations; the first one is written.
_ACTIVATIONS = {
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new"),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}
_CLASSIFIER = "ForSequenceClassification"
_RESIDUAL_DROPOUT = "residual_dropout"


class HfConfig:
    """The keys of a `config.json`, with errors that name the file."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content = content
        self.where = where

    def need(self, key: str) -> Any:
        """A value without a default.

        Raises:
          UserError: the key is missing.
        """
        value = self.content.get(key)
        if value is None:
            raise UserError(f"{self.where}: the key {key} is missing")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """A value, or `default` if it is missing or null."""
        value = self.content.get(key)
        return default if value is None else value

    def refuse(self, key: str, allowed: Any) -> None:
        """Checks a key of which jaxcl supports only one value.

        Raises:
          UserError: the key has another value.
        """
        if (value := self.get(key, allowed)) != allowed:
            raise UserError(f"{self.where}: {key}={value} is not supported; allowed is {allowed}")


def from_hf(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of the model configuration that a `config.json` describes.

    Args:
      content: the parsed file.
      where: its path, for messages.

    Returns:
      Keyword arguments of `LlamaConfig` or `RobertaConfig`.

    Raises:
      UserError: a model type or setting that jaxcl does not support, or a missing key.
    """
    config = HfConfig(content, where)
    kind = config.need("model_type")
    if kind not in _READERS:
        raise UserError(f"{where}: model_type={kind} is not supported; allowed are {', '.join(_READERS)}")
    if config.get("quantization_config") is not None:
        raise UserError(f"{where}: quantised checkpoints are read from GGUF only; this one has a quantization_config")
    fields = _READERS[kind](config)
    if any(str(name).endswith(_CLASSIFIER) for name in config.get("architectures", ())):
        # transformers does not write its default of two labels.
        fields["num_labels"] = len(config.get("id2label", {0: "", 1: ""}))
    return fields


def _llama(config: HfConfig) -> dict[str, Any]:
    if config.get("hidden_act", "silu") not in _ACTIVATIONS["silu"]:
        raise UserError(f"{config.where}: hidden_act={config.content['hidden_act']} is not supported; allowed is silu")
    config.refuse("partial_rotary_factor", 1.0)
    heads = config.need("num_attention_heads")
    max_length = config.get("max_position_embeddings", 2048)
    rope = config.get("rope_parameters", {})
    return {
        "architecture": "llama",
        "vocab_size": config.need("vocab_size"),
        "hidden_size": config.need("hidden_size"),
        "intermediate_size": config.need("intermediate_size"),
        "num_layers": config.need("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads", heads),
        "head_dim": config.get("head_dim", 0),
        "max_length": max_length,
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta", 10000.0),
        "rope_scaling": _rope_scaling(config, rope or config.get("rope_scaling", {}), max_length),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        **_llama_dropout(config),
        "init_std": config.get("initializer_range", 0.02),
    }


def _llama_dropout(config: HfConfig) -> dict[str, float | None]:
    # transformers drops attention probabilities only; the rate on residual branches is jaxcl's own key.
    hidden, attention = config.get(_RESIDUAL_DROPOUT, 0.0), config.get("attention_dropout", 0.0)
    return {"dropout": hidden, "attention_dropout": None if attention == hidden else attention}


def _rope_scaling(config: HfConfig, rope: Mapping[str, Any], max_length: int) -> dict[str, Any] | None:
    # The key is called `type` in older files; newer ones keep it in `rope_parameters`, together with `rope_theta`.
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("llama3", "linear"):
        raise UserError(f"{config.where}: rope_type={kind} is not supported; allowed are default, linear, llama3")
    try:
        scaling: dict[str, Any] = {"type": kind, "factor": rope["factor"]}
        if kind == "llama3":
            scaling |= {key: rope[key] for key in ("low_freq_factor", "high_freq_factor")}
            scaling["original_max_length"] = rope.get("original_max_position_embeddings", max_length)
    except KeyError as error:
        raise UserError(f"{config.where}: rope_scaling: the key {error} is missing") from None
    return scaling


def _encoder(config: HfConfig, *, bert: bool) -> dict[str, Any]:
    config.refuse("is_decoder", False)
    config.refuse("add_cross_attention", False)
    config.refuse("position_embedding_type", "absolute")
    config.refuse("tie_word_embeddings", True)
    name = config.get("hidden_act", "gelu")
    activation = next((ours for ours, theirs in _ACTIVATIONS.items() if name in theirs), None)
    if activation is None:
        allowed = ", ".join(name for theirs in _ACTIVATIONS.values() for name in theirs)
        raise UserError(f"{config.where}: hidden_act={name} is not supported; allowed are {allowed}")
    pad = config.get("pad_token_id", 0 if bert else 1)
    offset = 0 if bert else pad + 1
    return {
        "architecture": "roberta",
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


_READERS = {
    "llama": _llama,
    # Mistral without its sliding window is a LLaMA.
    "mistral": _llama,
    "roberta": lambda config: _encoder(config, bert=False),
    "bert": lambda config: _encoder(config, bert=True),
}


def sliding_window(content: Mapping[str, Any]) -> int | None:
    """The attention window in tokens; `None` if a `config.json` does not limit it."""
    if content.get("model_type") == "mistral":
        return content.get("sliding_window")
    return None


def is_bert(config: RobertaConfig) -> bool:
    """Whether an encoder's positions start at row 0 of the table, as in BERT."""
    return config.position_offset == 0


def to_hf(config: LlamaConfig | RobertaConfig, token_ids: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The `config.json` with which transformers computes the same network.

    Args:
      config: the model.
      token_ids: special token ids by transformers' names (`TOKEN_IDS`); others are left out.
      dtype: precision of the tensors.

    Raises:
      UserError: transformers has no such network.
    """
    fields = _llama_to_hf(config) if isinstance(config, LlamaConfig) else _encoder_to_hf(config)
    # Unknown ids are written as null: leaving them out would mean transformers' defaults.
    ids = {key: token_ids.get(key) for key in TOKEN_IDS[:3]} | dict(token_ids)
    fields = {key: value for key, value in ids.items() if key in TOKEN_IDS} | fields
    if config.num_labels:
        names = [f"LABEL_{label}" for label in range(config.num_labels)]
        fields["id2label"] = {str(label): name for label, name in enumerate(names)}
        fields["label2id"] = {name: label for label, name in enumerate(names)}
    return fields | {"initializer_range": config.init_std, "torch_dtype": dtype}


def _llama_to_hf(config: LlamaConfig) -> dict[str, Any]:
    hidden, attention = config.dropout_rates
    return {
        "architectures": [f"Llama{_CLASSIFIER if config.num_labels else 'ForCausalLM'}"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        # Keys that all releases of transformers understand.
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_hf(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": attention,
    } | ({_RESIDUAL_DROPOUT: hidden} if hidden else {})


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    rope: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_max_length
    return rope


def _encoder_to_hf(config: RobertaConfig) -> dict[str, Any]:
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
        "architectures": [f"{'Bert' if bert else 'Roberta'}{_CLASSIFIER if config.num_labels else 'ForMaskedLM'}"],
        "model_type": "bert" if bert else "roberta",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": _ACTIVATIONS[config.activation][0],
        "max_position_embeddings": config.max_length + config.position_offset,
        "type_vocab_size": config.type_vocab_size,
        "pad_token_id": config.pad_id,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "tie_word_embeddings": True,
    }
