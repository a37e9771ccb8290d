"""What a family of checkpoints is: its `config.json` to model fields and back, and its tensor names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxcl.errors import UserError
from jaxcl.models.deberta import DebertaConfig
from jaxcl.models.llama_config import LlamaConfig
from jaxcl.models.modernbert import ModernBertConfig
from jaxcl.models.roberta import RobertaConfig
from jaxcl.weights.tables import Table

CLASSIFIER = "ForSequenceClassification"

# transformers' names of the activations; the first one is written.
ACTIVATIONS = {
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new"),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}

Fields = dict[str, Any]
Config = LlamaConfig | RobertaConfig | ModernBertConfig | DebertaConfig


class HfConfig:
    """The keys of a `config.json`, with errors that name the file.

    Args:
      content: the parsed file.
      where: its path, for messages.
      defaults: what keys mean that the file leaves out.

    Attributes:
      last: the key that was asked for last.
    """

    last = ""

    def __init__(self, content: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.content = {**(defaults or {}), **content}
        self.where = where

    def need(self, key: str) -> Any:
        """A value without a default.

        Raises:
          UserError: the key is missing.
        """
        value = self.get(key)
        if value is None:
            raise UserError(f"{self.where}: the key {key} is missing")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """A value, or `default` if it is missing or null."""
        self.last = key
        value = self.content.get(key)
        return default if value is None else value

    def refuse(self, key: str, allowed: Any) -> None:
        """Checks a key of which jaxcl supports only one value.

        Raises:
          UserError: the key has another value.
        """
        if (value := self.get(key, allowed)) != allowed:
            raise UserError(f"{self.where}: {key}={value} is not supported; allowed is {allowed}")

    def activation(self, key: str, default: str) -> str:
        """Jaxcl's name of an activation.

        Raises:
          UserError: jaxcl has no such activation.
        """
        name = self.get(key, default)
        for ours, theirs in ACTIVATIONS.items():
            if name in theirs:
                return ours
        allowed = ", ".join(name for theirs in ACTIVATIONS.values() for name in theirs)
        raise UserError(f"{self.where}: {key}={name} is not supported; allowed are {allowed}")


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one `model_type` are read and written.

    Attributes:
      model_type: the value of that key in `config.json`.
      classes: what the names of transformers' classes begin with, `Llama` in `LlamaForCausalLM`.
      read: fields of the model configuration, from the keys of a file with the defaults filled in.
      write: keys of a file, from a model configuration.
      table: names and layouts of the tensors.
      defaults: what keys mean that a file leaves out: the defaults of transformers' class.
      head: ending of the class that predicts tokens.
    """

    model_type: str
    classes: str
    read: Callable[[HfConfig], Fields]
    write: Callable[[Any], Fields]
    table: Table
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: str = "ForCausalLM"
