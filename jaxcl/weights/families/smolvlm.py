"""SmolVLM and Idefics3: a LLaMA that reads what a SigLIP tower and a connector make of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcl.errors import UserError
from jaxcl.models.llama_config import LlamaConfig
from jaxcl.weights.families import llama
from jaxcl.weights.families.base import ACTIVATIONS, Family, Fields, HfConfig
from jaxcl.weights.tables import Row, decoder_table, linear

(_LLAMA,) = llama.FAMILIES

PIXEL_KEYS = ("image_mean", "image_std")
"""How pixels are normalised; transformers has these keys in the file of the image processor."""

# Keys of vision_config, and the fields that they are.
_TOWER = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "init_std",
}
_TOWER_DEFAULTS: Fields = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.02,
}
_DEFAULTS: Fields = {"scale_factor": 2, "image_token_id": 128257, "tie_word_embeddings": False}


def _nested(config: HfConfig, key: str, defaults: Mapping[str, Any]) -> HfConfig:
    content = config.need(key)
    if not isinstance(content, Mapping):
        raise UserError(f"{config.where}: {key}: expected a section, got {content!r}")
    return HfConfig(content, f"{config.where}: {key}", defaults)


def _family(model_type: str, classes: str) -> Family:
    def read(config: HfConfig) -> Fields:
        text = _nested(config, "text_config", _LLAMA.defaults)
        text.refuse("model_type", "llama")
        tower = _nested(config, "vision_config", _TOWER_DEFAULTS)
        tower.refuse("num_channels", 3)
        tower.refuse("attention_dropout", 0.0)
        vision = {field: tower.need(key) for key, field in _TOWER.items()}
        vision["activation"] = tower.activation("hidden_act", "gelu_pytorch_tanh")
        # Keys of the image processor, which `read_config` puts here.
        vision |= {key: tower.get(key) for key in PIXEL_KEYS if tower.get(key) is not None}
        vision |= {"shuffle": config.need("scale_factor"), "image_token_id": config.need("image_token_id")}
        own = {"family": model_type, "tie_embeddings": config.get("tie_word_embeddings"), "vision": vision}
        return _LLAMA.read(text) | own

    def write(config: LlamaConfig) -> Fields:
        vision = config.vision
        if vision is None or config.num_labels:
            lacking = "vision is none" if vision is None else f"num_labels={config.num_labels}"
            raise UserError(
                f"model: transformers' {model_type} sees images and writes text: {lacking} has no place there"
            )
        tower = {key: getattr(vision, field) for key, field in _TOWER.items()}
        tower |= {"model_type": f"{model_type}_vision", "hidden_act": ACTIVATIONS[vision.activation][0]}
        usual = type(vision).model_fields
        tower |= {key: list(getattr(vision, key)) for key in PIXEL_KEYS if getattr(vision, key) != usual[key].default}
        return {
            "text_config": {"model_type": "llama", **_LLAMA.write(config)},
            "vision_config": tower,
            "scale_factor": vision.shuffle,
            "image_token_id": vision.image_token_id,
            "tie_word_embeddings": config.tie_embeddings,
        }

    return Family(model_type, classes, read, write, _TABLE, _DEFAULTS, "ForConditionalGeneration")


def _norm(path: str, name: str) -> tuple[Row, ...]:
    return (Row(f"{path}/scale", f"{name}.weight", _VECTOR), Row(f"{path}/bias", f"{name}.bias", _VECTOR))


def _rows(tower: str, connector: str) -> tuple[Row, ...]:
    """The rows of tower and connector, whose names begin with these prefixes."""
    block, ours, ends = tower + "encoder.layers.{layer}.", "vision/tower/blocks", f"{tower}embeddings."
    split, split_bias = "(heads head_dim) embed -> embed heads head_dim", "(heads head_dim) -> heads head_dim"
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    return (
        *linear(
            "vision/tower/patch",
            f"{ends}patch_embedding",
            "embed channels height width -> height width channels embed",
            _VECTOR,
        ),
        Row("vision/tower/position/embedding", f"{ends}position_embedding.weight", "rows embed -> rows embed"),
        *_norm(f"{ours}/attention_norm", f"{block}layer_norm1"),
        *(
            row
            for part, name in projections.items()
            for row in linear(f"{ours}/{part}", f"{block}self_attn.{name}", split, split_bias)
        ),
        *linear(f"{ours}/out", f"{block}self_attn.out_proj", "embed (heads head_dim) -> heads head_dim embed", _VECTOR),
        *_norm(f"{ours}/mlp_norm", f"{block}layer_norm2"),
        *linear(f"{ours}/up", f"{block}mlp.fc1", "mlp embed -> embed mlp", "mlp -> mlp"),
        *linear(f"{ours}/down", f"{block}mlp.fc2", "embed mlp -> mlp embed", _VECTOR),
        *_norm("vision/tower/norm", f"{tower}post_layernorm"),
        *linear("vision/connector", f"{connector}modality_projection.proj", "output input -> input output"),
    )


_VECTOR = "embed -> embed"
_TABLE = decoder_table(body="model.text_model.", rows=_rows("model.vision_model.", "model.connector."))
FAMILIES = (_family("smolvlm", "SmolVLM"), _family("idefics3", "Idefics3"))
