"""GGUF files, written here with the gguf package."""

from __future__ import annotations

import importlib.machinery
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network, Params
from jaxcl.models.quantised import quantise
from jaxcl.models.rotary import RopeScaling
from jaxcl.weights import load_params, load_weights, read_config, read_token_ids
from tests.tiny.families import config_of
from tests.tiny.networks import CONFIGS, LLAMA, ROPE, assert_equal_bits, random_params

# What llama.cpp calls the tensors, written out again rather than taken from the code under test.
NAMES = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "out": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of query and key projections: first and second halves of a head in turn."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def tensors(config: LlamaConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of a GGUF file, `[output, input]`."""
    yield "token_embd.weight", np.asarray(params["embed"]["embedding"])
    yield "output_norm.weight", np.asarray(params["final_norm"]["scale"])
    if "head" in params:
        yield "output.weight", np.asarray(params["head"]["kernel"]).T
    blocks = params["blocks"]
    for layer in range(config.num_layers):
        for norm in ("attention_norm", "mlp_norm"):
            yield f"blk.{layer}.{NAMES[norm]}.weight", np.asarray(blocks[norm]["scale"][layer])
        for norm in ("query_norm", "key_norm"):
            if norm in blocks["attention"]:
                name = f"attn_{norm[0]}_norm"
                yield f"blk.{layer}.{name}.weight", np.asarray(blocks["attention"][norm]["scale"][layer])
        attention = [(blocks["attention"], name) for name in ("query", "key", "value", "out")]
        mlp = [(blocks["mlp"], name) for name in ("gate", "up", "down")]
        for part, name in attention + mlp:
            kernel = np.asarray(part[name]["kernel"][layer])
            outputs = kernel.shape[-1] if name in ("out", "gate", "up", "down") else kernel.shape[1] * kernel.shape[2]
            weight = kernel.reshape(-1, outputs).T
            heads = {"query": config.num_heads, "key": config.num_kv_heads}.get(name)
            heads = heads if config.family in ("llama", "mistral") else None
            if heads:
                weight = interleave(weight, heads)
            yield f"blk.{layer}.{NAMES[name]}.weight", weight
            if "bias" in part[name]:
                bias = np.asarray(part[name]["bias"][layer]).reshape(-1)
                yield f"blk.{layer}.{NAMES[name]}.bias", interleave(bias, heads) if heads else bias


def write_gguf(
    path: Path,
    config: LlamaConfig,
    params: Params,
    *,
    quantised: gguf.GGMLQuantizationType | None = None,
    extra: dict[str, np.ndarray | None] | None = None,
    metadata: dict[str, Any] | None = None,
    architecture: str = "llama",
    raw: tuple[gguf.GGMLQuantizationType, dict[str, np.ndarray]] | None = None,
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_bos_token_id(5)
    writer.add_eos_token_id(6)
    for key, value in (metadata or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    held = dict(tensors(config, params)) | (extra or {})
    for name, value in held.items():
        if value is None:
            continue
        value = np.ascontiguousarray(value, np.float32)
        if raw is not None and name in raw[1]:
            writer.add_tensor(name, raw[1][name], raw_dtype=raw[0])
        elif quantised is None or value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            data = gguf.quants.quantize(value, quantised)
            writer.add_tensor(name, data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-linear-rope", "llama-biases"])
def test_everything_is_read_back(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    assert isinstance(config, LlamaConfig)
    config = config.model_copy(update={"dropout": 0.0})
    extra: dict[str, np.ndarray | None] = {}
    metadata: dict[str, Any] = {}
    if name == "llama-linear-rope":
        metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    if name == "llama-biases":
        config = config.model_copy(update={"rope_scaling": None})
    params = random_params(Network.create(config))
    write_gguf(tmp_path / "model.gguf", config, params, extra=extra, metadata=metadata)
    network, found = load_weights(tmp_path / "model.gguf")
    assert network.config == config
    assert_equal_bits(found, params)
    # A folder with one such file stands for it.
    assert read_config(tmp_path) == config
    assert read_token_ids(tmp_path) == {"bos_token_id": 5, "eos_token_id": 6}


@pytest.mark.parametrize("name", ["qwen2-without-window", "qwen3"])
def test_qwen_is_read_back(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    params = random_params(Network.create(config))
    write_gguf(tmp_path / "model.gguf", config, params, architecture=config.family)
    network, found = load_weights(tmp_path / "model.gguf")
    assert network.config == config
    assert_equal_bits(found, params)


def test_a_mistral_is_a_llama_with_a_window(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    assert isinstance(config, LlamaConfig)
    params = random_params(Network.create(config))
    write_gguf(tmp_path / "model.gguf", config, params, metadata={"llama.attention.sliding_window": 32})
    network, found = load_weights(tmp_path / "model.gguf")
    assert network.config == config.model_copy(update={"family": "mistral", "layer_types": ("window",), "window": 32})
    assert_equal_bits(found, params)


def test_other_families_are_not_read_from_gguf(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    assert isinstance(config, LlamaConfig)
    write_gguf(tmp_path / "model.gguf", config, random_params(Network.create(config)))
    with pytest.raises(UserError, match=r"model\.family: olmo2 is not read from GGUF; allowed are llama, mistral"):
        load_params(tmp_path / "model.gguf", Network.create(config_of("olmo2")))


# Where the scales of a block are, float16, and how many of them: anything else may be any bits.
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208, 1), "Q8_0": (0, 1)}


@pytest.mark.parametrize("kind", SCALES)
def test_the_types_that_people_download_are_read(kind: str, tmp_path: Path) -> None:
    """Q4_K_M and Q5_K_M files hold Q4_K or Q5_K, and Q6_K. The package cannot make them, so these are random blocks."""
    own = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[own]
    config = LlamaConfig(**LLAMA | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}, family="qwen2")
    config = config.model_copy(update={"attention_bias": True, "attention_out_bias": False})
    params = random_params(Network.create(config))
    rng = np.random.default_rng(0)

    def blocks(shape: tuple[int, ...]) -> np.ndarray:
        raw = rng.integers(0, 256, (shape[0], shape[1] // elements, size), np.uint8)
        start, count = SCALES[kind]
        scales = rng.uniform(0.01, 0.02, (*raw.shape[:2], count)).astype(np.float16)
        raw[:, :, start : start + 2 * count] = scales.view(np.uint8)
        return raw.reshape(shape[0], -1)

    held = {name: blocks(value.shape) if value.ndim == 2 else None for name, value in tensors(config, params)}
    raw = {name: value for name, value in held.items() if value is not None}
    write_gguf(tmp_path / "model.gguf", config, params, architecture="qwen2", raw=(own, raw))
    network, found = load_weights(tmp_path / "model.gguf")
    assert network.config == config
    want = gguf.quants.dequantize(raw["blk.1.attn_k.weight"], own)  # [kv_heads * head_dim, embed]
    np.testing.assert_array_equal(found["blocks"]["attention"]["key"]["kernel"][1].reshape(256, -1), want.T)
    want = gguf.quants.dequantize(raw["blk.2.ffn_down.weight"], own)
    np.testing.assert_array_equal(found["blocks"]["mlp"]["down"]["kernel"][2], want.T)
    assert np.std(want) > 0.01


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_tensors_are_what_the_gguf_package_makes_of_them(kind: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16}
    config = LlamaConfig(**LLAMA | wide, tie_embeddings=True)
    params = random_params(Network.create(config))
    quantised = gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "model.gguf", config, params, quantised=quantised)
    found = load_params(tmp_path / "model.gguf", Network.create(config))
    embedding = np.asarray(params["embed"]["embedding"])
    expected = gguf.quants.dequantize(gguf.quants.quantize(embedding, quantised), quantised)
    np.testing.assert_array_equal(found["embed"]["embedding"], expected)
    up = np.asarray(params["blocks"]["mlp"]["up"]["kernel"])
    error = np.abs(np.asarray(found["blocks"]["mlp"]["up"]["kernel"]) - up).max()
    assert 0 < error < {"Q8_0": 0.02, "Q4_1": 0.2, "F16": 1e-3, "BF16": 0.01}[kind]


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_file_is_quantised_anew_beside_adapters(how: Any, tmp_path: Path) -> None:
    sizes = LLAMA | {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16}
    plain = Network.create(LlamaConfig(**sizes, tie_embeddings=True))
    held = Network.create(LlamaConfig(**sizes, tie_embeddings=True, lora={"rank": 2}, quantise=how))
    file, quantised = tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0
    write_gguf(file, plain.config, random_params(plain), quantised=quantised)
    kernel = load_params(file, plain)["blocks"]["attention"]["key"]["kernel"]
    found = load_params(file, held, key=jax.random.key(0))["blocks"]["attention"]["key"]
    expected = jax.jit(lambda kernel: quantise(kernel, found["kernel_scale"].shape, how))(kernel)
    np.testing.assert_array_equal(found["kernel"], expected.codes)
    np.testing.assert_array_equal(found["kernel_scale"], expected.scale)


def test_stretched_frequencies_are_recognised(tmp_path: Path) -> None:
    """The factors that llama.cpp writes, by the formula of Llama 3.1's release."""
    config = LlamaConfig(**LLAMA | {"head_dim": 64}, rope_theta=5e5)
    plain = 5e5 ** (-np.arange(0, 64, 2) / 64)
    factors = []
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 32 + smooth))
    assert len(set(factors)) > 2
    params = random_params(Network.create(config))
    write_gguf(tmp_path / "a.gguf", config, params, extra={"rope_freqs.weight": np.asarray(factors)})
    scaling = read_config(tmp_path / "a.gguf").rope_scaling
    assert scaling == RopeScaling(**ROPE | {"factor": 32.0, "original_max_length": 8192})
    load_weights(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", config, params, extra={"rope_freqs.weight": np.linspace(1, 9, 32)})
    write_gguf(tmp_path / "c.gguf", config, params, extra={"rope_freqs.weight": np.ones(31)})
    with pytest.raises(UserError, match=r"rope_freqs\.weight has 31 factors; expected one for every two of the 64"):
        read_config(tmp_path / "c.gguf")
    with pytest.raises(UserError, match=r"rope_freqs\.weight do not follow from the llama3 rule"):
        read_config(tmp_path / "b.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "qwen2moe"}, r"architecture=qwen2moe is not supported; allowed are llama, qwen2, qwen3"),
        ({"metadata": {"llama.expert_count": 8}}, r"a mixture of 8 experts is not supported"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"scaling\.type=yarn is not supported"),
        ({"extra": {"token_embd.weight": None}}, r"the tensor token_embd\.weight is missing"),
    ],
)
def test_networks_that_jaxcl_does_not_have(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    assert isinstance(config, LlamaConfig)
    write_gguf(tmp_path / "model.gguf", config, random_params(Network.create(config)), **change)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"the tensor blk\.1\.ffn_up\.weight is missing$"),
        ({"blk.1.ffn_up_exps.weight": np.ones((2, 2))}, r"no parameter for the tensor blk\.1\.ffn_up_exps\.weight$"),
        ({"blk.2.attn_q.weight": np.ones((32, 25))}, r"attn_q\.weight has shape \[32, 25\]; .* needs \[32, 24\]"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(
    extra: dict[str, np.ndarray | None], message: str, tmp_path: Path
) -> None:
    config = CONFIGS["llama"]
    assert isinstance(config, LlamaConfig)
    network = Network.create(config)
    write_gguf(tmp_path / "model.gguf", config, random_params(network), extra=extra)
    with pytest.raises(UserError, match=message):
        load_params(tmp_path / "model.gguf", network)


def test_damaged_files_and_ambiguous_folders(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    assert isinstance(config, LlamaConfig)
    write_gguf(tmp_path / "a.gguf", config, random_params(Network.create(config)))
    whole = (tmp_path / "a.gguf").read_bytes()
    for cut in (0, 2, 100, 700, len(whole) - 200):
        (tmp_path / "b.gguf").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"b\.gguf is not a complete GGUF file"):
            read_config(tmp_path / "b.gguf")
    with pytest.raises(UserError, match=rf"holds 2 \.gguf files; name one, for example {re.escape(str(tmp_path))}"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="encoders are read from safetensors only"):
        load_params(tmp_path / "a.gguf", Network.create(CONFIGS["roberta"]))


def test_a_package_is_looked_into_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["llama"]
    assert isinstance(config, LlamaConfig)
    package = tmp_path / "weights_of_a_tiny_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_gguf(package / "model.gguf", config, random_params(Network.create(config)))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.machinery.PathFinder.invalidate_caches()
    assert read_config("package:weights_of_a_tiny_model") == config
