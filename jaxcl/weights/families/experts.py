"""Qwen3-MoE and OLMoE: a router and experts in place of the feed-forward part, in every layer."""

from __future__ import annotations

from jaxcl.errors import UserError
from jaxcl.models.llama_config import LlamaConfig
from jaxcl.weights.families.base import Fields, HfConfig
from jaxcl.weights.families.decoder import decoder, every
from jaxcl.weights.tables import decoder_table

_TABLE = decoder_table(experts=True)
_DEFAULTS = {
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "attention_bias": False,
}
_KEYS = {
    "num_experts_per_tok": "experts_per_token",
    "norm_topk_prob": "normalise_top_k",
    "attention_bias": "attention_bias",
}


def _read(config: HfConfig, experts: int) -> Fields:
    # transformers 5 writes the second name where it reads the first.
    count = config.get("num_experts", config.get("num_local_experts", experts))
    if not count:
        raise UserError(f"{config.where}: num_experts={count} is not supported; allowed are numbers above 0")
    # The loss is used there only where routers' scores are asked for.
    weight = config.need("router_aux_loss_coef") if config.get("output_router_logits") else 0.0
    return {"num_experts": count, "router_loss_weight": weight}


def _write(config: LlamaConfig) -> Fields:
    weight = config.router_loss_weight
    content = {"num_experts": config.num_experts, "output_router_logits": weight > 0}
    return content | ({"router_aux_loss_coef": weight} if weight else {})


def _read_qwen(config: HfConfig) -> Fields:
    window = {} if config.get("use_sliding_window") else {"layer_types": ("full",), "window": 0}
    return _read(config, 128) | window


def _write_qwen(config: LlamaConfig) -> Fields:
    return _write(config) | {"use_sliding_window": bool(config.window)}


def _read_olmo(config: HfConfig) -> Fields:
    return _read(config, 64) | {"expert_size": config.need("intermediate_size")}


FAMILIES = (
    decoder(
        "qwen3_moe",
        "Qwen3Moe",
        _TABLE,
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "router_aux_loss_coef": 0.001,
            "use_sliding_window": False,
            "sliding_window": 4096,
        },
        switches={"qk_norm": "head"},
        keys=_KEYS | {"moe_intermediate_size": "expert_size"},
        refused={"decoder_sparse_step": 1, "mlp_only_layers": []},
        pattern=every,
        types=False,
        read=_read_qwen,
        write=_write_qwen,
    ),
    decoder(
        "olmoe",
        "Olmoe",
        decoder_table(experts=True, flat_norms=True),
        defaults=_DEFAULTS | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.01},
        switches={"qk_norm": "flat"},
        keys=_KEYS,
        refused={"clip_qkv": None},
        read=_read_olmo,
        write=_write,
    ),
)
