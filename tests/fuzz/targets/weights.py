"""Weights, and the configurations beside them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.config import parse_config
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.models.network import Network
from jaxcl.weights import read_config, read_token_ids
from jaxcl.weights.adapters import read_lora
from jaxcl.weights.source import Safetensors
from tests.fuzz.harness import Target
from tests.fuzz.targets.common import made, text_of, written
from tests.tiny.runs import PAIRS

HF: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8, "head_dim": 4,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": {"rope_type": "linear",
    "factor": 2.0}, "hidden_act": "silu", "tie_word_embeddings": True, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": [2, 3],
}  # fmt: skip


def gguf_file() -> bytes:
    import gguf

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(32)
        writer.add_embedding_length(8)
        writer.add_block_count(1)
        writer.add_feed_forward_length(8)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "ab", "<s>"])
        writer.add_token_merges(["a b"])
        writer.add_token_types([1, 1, 1, 3])
        writer.add_eos_token_id(3)
        writer.add_chat_template("{{ messages }}")
        writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
        writer.add_tensor("rope_freqs.weight", np.ones(2, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return made(write, "model.gguf")


def read_gguf(content: bytes, folder: Path) -> None:
    # Named anew, because contents are cached by name.
    path = written(folder / "model.gguf", content)
    read_config(path)
    read_token_ids(path)


def read_gguf_tokenizer(content: bytes, folder: Path) -> None:
    Tokenizer.load(written(folder / "model.gguf", content)).backend.encode("ab <s>")


def safetensors() -> bytes:
    from safetensors.numpy import save

    return save({"model.embed_tokens.weight": np.ones((8, 8), np.float32), "b": np.zeros((2, 3), np.float16)})


def read_tensors(place: Path) -> None:
    with Safetensors(place) as source:
        for name, shape in source.shapes.items():
            source.read(name, tuple(slice(0, size) for size in shape))


def read_safetensors(content: bytes, folder: Path) -> None:
    read_tensors(written(folder / "model.safetensors", content))


def read_index(content: bytes, folder: Path) -> None:
    written(folder / "one.safetensors", safetensors())
    written(folder / "model.safetensors.index.json", content)
    read_tensors(folder)


def read_hf(content: bytes, folder: Path) -> None:
    written(folder / "model.safetensors", safetensors())
    written(folder / "config.json", content)
    read_config(folder)
    read_token_ids(folder)


def hf_seeds() -> list[bytes]:
    from jaxcl.weights.hf_config import to_hf
    from tests.tiny.networks import CONFIGS
    from tests.tiny.vision import SEEING

    written = [to_hf(config, {}, "float32") for config in CONFIGS.values()]
    return [text_of(one) for one in (HF, *written, *SEEING.values())]


def read_adapters(content: bytes, folder: Path) -> None:
    from safetensors.numpy import save

    name = "base_model.model.model.layers.0.self_attn.q_proj"
    written(
        folder / "adapter_model.safetensors",
        save({f"{name}.lora_A.weight": np.ones((2, 16), "f4"), f"{name}.lora_B.weight": np.ones((16, 2), "f4")}),
    )
    written(folder / "adapter_config.json", content)
    read_lora(folder, network())


@functools.cache
def network() -> Network:
    return Network.create(parse_config({**PAIRS, "output": "x", "method": "sequential"}).model)


ADAPTERS = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none", "rank_pattern": {},
    "alpha_pattern": {"q_proj": 8}, "use_rslora": False, "fan_in_fan_out": False,
}  # fmt: skip


TARGETS: dict[str, Target] = {
    "gguf": Target(read_gguf, lambda: [gguf_file()], weight=2),
    "gguf_tokenizer": Target(read_gguf_tokenizer, lambda: [gguf_file()], weight=2),
    "safetensors": Target(read_safetensors, lambda: [safetensors()]),
    "safetensors_index": Target(
        read_index, lambda: [text_of({"metadata": {}, "weight_map": {"b": "one.safetensors"}})]
    ),
    "hf_config": Target(read_hf, hf_seeds, weight=2),
    "adapter_config": Target(read_adapters, lambda: [text_of(ADAPTERS)]),
}
