"""What families of decoders share. Each says what it adds: hard-wired switches, further keys, layer patterns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxcl.errors import UserError
from jaxcl.models.llama_config import LlamaConfig
from jaxcl.weights.families.base import ACTIVATIONS, Family, Fields, HfConfig
from jaxcl.weights.families.rope import FULL, WINDOW, read_rope, write_rope
from jaxcl.weights.tables import Table

# Keys that every file has, and the fields that they are.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
# Keys with defaults. `family` adds those of the family.
_KEYS = {
    "head_dim": "head_dim",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
DEFAULTS: Fields = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
}
"""What a file of a decoder means by keys that it leaves out, unless the family says otherwise."""

_NULLABLE = ("attention_cap", "logit_cap")

# transformers drops attention probabilities only; the rate on residual branches is jaxcl's own key.
_RESIDUAL_DROPOUT = "residual_dropout"

Pattern = Callable[[HfConfig], list[str]]
"""The type of each layer by a family's rule, for files without `layer_types`."""


def decoder(
    model_type: str,
    classes: str,
    table: Table,
    *,
    defaults: Mapping[str, Any] | None = None,
    switches: Mapping[str, Any] | None = None,
    keys: Mapping[str, str] | None = None,
    refused: Mapping[str, Any] | None = None,
    activation: str = "hidden_act",
    theta: float = 10000.0,
    window_theta: float | None = None,
    partial: bool = False,
    pattern: Pattern | None = None,
    types: bool = True,
    head: str = "ForCausalLM",
    read: Callable[[HfConfig], Fields] | None = None,
    write: Callable[[LlamaConfig], Fields] | None = None,
) -> Family:
    """A family of decoders.

    Args:
      model_type: see `Family`.
      classes: see `Family`.
      table: see `Family`.
      defaults: see `Family`; those that differ from `DEFAULTS`.
      switches: fields that the family's code hard-wires.
      keys: keys beyond the common ones that hold fields as they are, with the fields' names.
      refused: keys of which one value only is supported.
      activation: the key that names the activation.
      theta: see `read_rope`.
      window_theta: see `read_rope`.
      partial: see `read_rope`.
      pattern: layer types where the file has none; `None`: no layer of the family has a window.
      types: whether files list the types of the layers; if not, the pattern is all there is.
      head: see `Family`.
      read: further fields.
      write: further keys; they replace those of the same name.
    """
    own_keys = _KEYS | dict(keys or {})
    own_defaults = DEFAULTS | dict(defaults or {})
    for key in keys or {}:
        own_defaults.setdefault(key, None)

    def read_fields(config: HfConfig) -> Fields:
        for key, allowed in (refused or {}).items():
            config.refuse(key, allowed)
        fields: Fields = {"architecture": "llama", "family": model_type, **(switches or {})}
        fields |= {field: config.need(key) for key, field in _SIZES.items()}
        fields["num_kv_heads"] = config.get("num_key_value_heads", fields["num_heads"])
        for key, field in own_keys.items():
            value = config.content.get(key)
            # Only of caps, null says something of its own: none.
            fields[field] = own_defaults.get(key) if value is None and field not in _NULLABLE else value
        fields["activation"] = config.activation(activation, "silu")
        fields |= _read_dropout(config)
        fields |= read_rope(config, theta=theta, window_theta=window_theta, partial=partial)
        if pattern is not None:
            fields |= _read_layers(config, pattern, fields["num_layers"], types)
        return fields | (read(config) if read is not None else {})

    def write_keys(config: LlamaConfig) -> Fields:
        content: Fields = {key: getattr(config, field) for key, field in (_SIZES | own_keys).items()}
        content |= {"num_key_value_heads": config.num_kv_heads, activation: ACTIVATIONS[config.activation][0]}
        hidden, attention = config.dropout_rates
        content |= {"attention_dropout": attention} | ({_RESIDUAL_DROPOUT: hidden} if hidden else {})
        content |= write_rope(config)
        if pattern is not None:
            content["sliding_window"] = config.window or None
            if types:
                content["layer_types"] = [WINDOW if own else FULL for own in config.windowed]
        return content | (write(config) if write is not None else {})

    return Family(model_type, classes, read_fields, write_keys, table, own_defaults, head)


def _read_dropout(config: HfConfig) -> Fields:
    hidden, attention = config.get(_RESIDUAL_DROPOUT, 0.0), config.get("attention_dropout", 0.0)
    return {"dropout": hidden, "attention_dropout": None if attention == hidden else attention}


def _read_layers(config: HfConfig, pattern: Pattern, layers: int, types: bool) -> Fields:
    window = config.get("sliding_window", 0)
    if not window:
        return {}
    kinds = (config.get("layer_types") if types else None) or pattern(config)
    if unknown := sorted(set(kinds) - {FULL, WINDOW}):
        raise UserError(f"{config.where}: layer_types: {unknown[0]} is not supported; allowed are {FULL}, {WINDOW}")
    if len(kinds) != layers:
        raise UserError(f"{config.where}: layer_types has {len(kinds)} entries for {layers} layers")
    return {"layer_types": tuple("window" if kind == WINDOW else "full" for kind in kinds), "window": window}


def every(config: HfConfig) -> list[str]:
    """The pattern of families all of whose layers have the window."""
    return [WINDOW] * int(config.need("num_hidden_layers"))


def every_nth_full(config: HfConfig, count: int) -> list[str]:
    """The pattern of families of whose layers every `count`-th attends to everything."""
    return [FULL if layer % count == 0 else WINDOW for layer in range(1, config.need("num_hidden_layers") + 1)]
