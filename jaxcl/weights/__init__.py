"""Checkpoints of other libraries to params and back: Hugging Face safetensors, GGUF, Orbax."""

from jaxcl.weights.adapters import load_peft, read_lora
from jaxcl.weights.convert import convert
from jaxcl.weights.load import load_params, load_weights, read_config, read_token_ids
from jaxcl.weights.locate import locate
from jaxcl.weights.named import named
from jaxcl.weights.orbax import save_orbax
from jaxcl.weights.peft import save_peft
from jaxcl.weights.save import save_hf

__all__ = [
    "convert",
    "load_params",
    "load_peft",
    "load_weights",
    "locate",
    "named",
    "read_config",
    "read_lora",
    "read_token_ids",
    "save_hf",
    "save_orbax",
    "save_peft",
]
