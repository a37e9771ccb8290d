"""From the `config.json` of a Hugging Face checkpoint to a model configuration, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcl.errors import UserError
from jaxcl.weights.families import family_of, find_family
from jaxcl.weights.families.base import CLASSIFIER, Config, HfConfig

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")

# Fields that no config.json holds.
_RUNTIME = {"compute", "lora", "quantise", "soft_tokens"}


def from_hf(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of the model configuration that a `config.json` describes.

    Args:
      content: the parsed file.
      where: its path, for messages.

    Returns:
      Keyword arguments of the configuration that `architecture` names.

    Raises:
      UserError: a model type or setting that jaxcl does not support, or a missing key.
    """
    if content.get("model_type") == "gemma3" and isinstance(content.get("text_config"), Mapping):
        # The text part of a model that also sees; its own type may be left out.
        content = {**content["text_config"], "model_type": "gemma3_text", "architectures": []}
    kind = HfConfig(content, where).need("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{where}: model_type={kind} is not supported; expected a name")
    family = find_family(kind, where)
    config = HfConfig(content, where, family.defaults)
    if config.get("quantization_config") is not None:
        raise UserError(f"{where}: quantised checkpoints are read from GGUF only; this one has a quantization_config")
    try:
        fields = family.read(config)
        if any(str(name).endswith(CLASSIFIER) for name in config.get("architectures", ())):
            # transformers does not write its default of two labels.
            fields["num_labels"] = len(config.get("id2label", {0: "", 1: ""}))
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:  # a value of another type
        raise UserError(
            f"{where}: a value cannot be used, probably {config.last}={config.get(config.last)!r}: {error}"
        ) from error
    return fields


def to_hf(config: Config, token_ids: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The `config.json` with which transformers computes the same network.

    Args:
      config: the model.
      token_ids: special token ids by transformers' names (`TOKEN_IDS`); others are left out.
      dtype: precision of the tensors.

    Raises:
      UserError: transformers has no such network.
    """
    family = family_of(config)
    ending = CLASSIFIER if config.num_labels else family.head
    fields: dict[str, Any] = {"architectures": [f"{family.classes}{ending}"], "model_type": family.model_type}
    fields |= family.write(config)
    # Unknown ids are written as null: leaving them out would mean transformers' defaults.
    ids = {key: token_ids.get(key) for key in TOKEN_IDS[:3]} | dict(token_ids)
    fields = {key: value for key, value in ids.items() if key in TOKEN_IDS} | fields
    if config.num_labels:
        names = [f"LABEL_{label}" for label in range(config.num_labels)]
        fields["id2label"] = {str(label): name for label, name in enumerate(names)}
        fields["label2id"] = {name: label for label, name in enumerate(names)}
    fields |= {"initializer_range": config.init_std, "torch_dtype": dtype}
    _refuse_what_is_lost(config, fields)
    return fields


def _refuse_what_is_lost(config: Config, written: Mapping[str, Any]) -> None:
    """A file that reads back as another network would be wrong without a word."""
    again = type(config)(**from_hf(written, "config.json"))
    for name in type(config).model_fields:
        value, read = getattr(config, name), getattr(again, name)
        if (name, value) == ("norm_scale", "cast"):
            value = "weight"  # the cast is transformers' own
        if name not in _RUNTIME and value != read:
            raise UserError(
                f"model: transformers' {written['model_type']} has no such network: {name}={value} would be read as "
                f"{read}; see model.family"
            )
