"""Checkpoints that are not what they seem: heads that are missing or there twice, values that are no numbers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcl.errors import UserError
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.run.model import load_model
from jaxcl.weights import convert, load_params, load_weights, read_config, save_hf, save_orbax
from tests.tiny.networks import CONFIGS, LLAMA, assert_equal_bits, random_params

EMBEDDINGS = {
    "llama-tied": ("model.embed_tokens.weight", "lm_head.weight"),
    "roberta": ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
}
BIASES = {
    "roberta": ("lm_head.bias", "lm_head.decoder.bias"),
    "bert": ("cls.predictions.bias", "cls.predictions.decoder.bias"),
}


def saved(folder: Path, name: str) -> Network:
    network = Network.create(CONFIGS[name])
    save_hf(folder, network, random_params(network))
    return network


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def put(folder: Path, content: dict[str, np.ndarray], **config: Any) -> None:
    save_file(content, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


# ---------------------------------------------------------------- missing heads


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("llama", "lm_head.weight"), ("roberta", "lm_head.dense.weight"), ("bert", "cls.predictions.bias")],
)
def test_a_head_that_is_missing_is_never_silently_random(name: str, tensor: str, tmp_path: Path) -> None:
    network = saved(tmp_path / "model", name)
    content = tensors(tmp_path / "model")
    del content[tensor]
    put(tmp_path / "model", content)
    with pytest.raises(UserError, match=rf"the tensor {tensor} is missing: .*set fresh_head to true"):
        load_params(tmp_path / "model", network, key=jax.random.key(0))
    found = load_params(tmp_path / "model", network, key=jax.random.key(0), fresh_head=True)
    assert_equal_bits(found["blocks"], random_params(network)["blocks"])
    with pytest.raises(UserError, match=rf"the tensor {tensor} is missing"):
        load_params(tmp_path / "model", network, fresh_head=True)  # without a key, nothing is drawn


def test_what_is_read_and_what_is_drawn_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path / "model", "llama")
    with caplog.at_level(logging.INFO, logger="jaxcl"):
        load_weights(tmp_path / "model", num_labels=3, key=jax.random.key(0))
        adapted = read_config(tmp_path / "model", lora={"targets": ["query"]})
        load_params(tmp_path / "model", Network.create(adapted), key=jax.random.key(0))
    count = len(jax.tree.leaves(random_params(Network.create(CONFIGS["llama"]))))
    levels, lines = zip(*((record.levelname, record.message) for record in caplog.records), strict=True)
    assert lines == (
        f"{tmp_path / 'model'}: {count} params read; randomly initialised: classifier/out/kernel",
        f"{tmp_path / 'model'}: {count} params read; randomly initialised: "
        "blocks/attention/query/lora_a, blocks/attention/query/lora_b",
    )
    assert levels == ("WARNING", "INFO")


# ---------------------------------------------------------------- names of one parameter


@pytest.mark.parametrize("name", sorted(EMBEDDINGS))
@pytest.mark.parametrize("kept", ["first", "second", "both"])
def test_a_tied_head_counts_by_either_name(name: str, kept: str, tmp_path: Path) -> None:
    network = saved(tmp_path / "model", name)
    content = tensors(tmp_path / "model")
    first, second = EMBEDDINGS[name]
    content[second] = content[first]
    if kept == "second":
        del content[first]
    elif kept == "first":
        del content[second]
    put(tmp_path / "model", content)
    assert_equal_bits(load_params(tmp_path / "model", network), random_params(network))


@pytest.mark.parametrize("name", sorted(BIASES))
def test_the_bias_of_a_masked_head_counts_by_either_name(name: str, tmp_path: Path) -> None:
    network = saved(tmp_path / "model", name)
    content = tensors(tmp_path / "model")
    first, second = BIASES[name]
    content[second] = content.pop(first)
    put(tmp_path / "model", content)
    assert_equal_bits(load_params(tmp_path / "model", network, key=jax.random.key(0)), random_params(network))
    put(tmp_path / "model", content | {first: content[second] + 1})
    with pytest.raises(UserError, match=rf"the tensor {second} differs from {first}"):
        load_params(tmp_path / "model", network)


@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_an_encoder_whose_decoder_is_not_its_embedding_is_refused(name: str, tmp_path: Path) -> None:
    network = saved(tmp_path / "model", name)
    content = tensors(tmp_path / "model")
    first, second = EMBEDDINGS[name]
    put(tmp_path / "model", content | {second: content[first] + 1})
    with pytest.raises(UserError, match=rf"the tensor {second} differs from {first}"):
        load_params(tmp_path / "model", network)


def test_a_head_of_its_own_counts_more_than_the_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in transformers, with which tests/parity compares the logits."""
    tied = saved(tmp_path / "model", "llama-tied")
    content = tensors(tmp_path / "model")
    head = content["model.embed_tokens.weight"] + 1
    head[:-1] -= 1  # only the last row differs
    put(tmp_path / "model", content | {"lm_head.weight": head})
    network, params = load_weights(tmp_path / "model")
    assert not network.config.tie_embeddings
    np.testing.assert_array_equal(params["head"]["kernel"], head.T)
    assert (
        "tie_word_embeddings is true, but the file's lm_head.weight differs from its embedding: not tied" in caplog.text
    )
    assert read_config(tmp_path / "model", tie_embeddings=True).tie_embeddings
    with pytest.raises(
        UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight.*tie_embeddings=false"
    ):
        load_params(tmp_path / "model", tied)


# ---------------------------------------------------------------- values that are no numbers


def spoilt(network: Network, value: float) -> Any:
    params = random_params(network)
    params["blocks"]["mlp"]["up"]["kernel"] = params["blocks"]["mlp"]["up"]["kernel"].at[1, 2, 3].set(value)
    return params


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("save", [save_hf, save_orbax])
def test_a_tensor_that_is_not_finite_is_named(save: Any, value: float, tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    save(tmp_path / "model", network, spoilt(network, value))
    name = r"model\.layers\.1\.mlp\.up_proj\.weight" if save is save_hf else "blocks/mlp/up/kernel"
    for read in (
        lambda: load_params(tmp_path / "model", network, key=jax.random.key(0)),
        lambda: convert(tmp_path / "model", tmp_path / "new"),
        lambda: load_model(str(tmp_path / "model")),
    ):
        with pytest.raises(UserError, match=rf"the tensor {name} holds NaN or infinite values \(read as float32\)"):
            read()


def test_values_beyond_the_range_of_the_dtype_are_not_finite_either(tmp_path: Path) -> None:
    network = saved(tmp_path / "model", "llama")
    content = tensors(tmp_path / "model")
    content["model.norm.weight"] = content["model.norm.weight"].astype(np.float64)
    content["model.norm.weight"][2] = 1e300
    put(tmp_path / "model", content)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN or infinite values \(read as float32\)"):
        load_params(tmp_path / "model", network)


# ---------------------------------------------------------------- configuration


def test_attention_dropout_of_a_llama_is_that_of_attention_alone(tmp_path: Path) -> None:
    saved(tmp_path / "model", "llama")
    put(tmp_path / "model", tensors(tmp_path / "model"), attention_dropout=0.5)
    config = read_config(tmp_path / "model")
    assert config.dropout_rates == (0.0, 0.5)
    assert read_config(tmp_path / "model", dropout=0.1).dropout_rates == (0.1, 0.5)
    put(tmp_path / "model", tensors(tmp_path / "model"), attention_dropout=0.0)
    assert read_config(tmp_path / "model", dropout=0.1).dropout_rates == (0.1, 0.1)


@pytest.mark.parametrize(
    "fields", [{"dropout": 0.25}, {"attention_dropout": 0.25}, {"dropout": 0.25, "attention_dropout": 0.0}]
)
def test_rates_of_dropout_survive_an_export(fields: dict[str, float], tmp_path: Path) -> None:
    network = Network.create(LlamaConfig(**LLAMA, **fields))
    save_hf(tmp_path / "model", network, random_params(network))
    assert read_config(tmp_path / "model").dropout_rates == network.config.dropout_rates
    theirs = json.loads((tmp_path / "model" / "config.json").read_text())
    assert theirs["attention_dropout"] == network.config.dropout_rates[1]


def test_a_null_quantization_config_is_none(tmp_path: Path) -> None:
    network = saved(tmp_path / "model", "llama")
    put(tmp_path / "model", tensors(tmp_path / "model"), quantization_config=None)
    assert read_config(tmp_path / "model") == network.config
    put(tmp_path / "model", tensors(tmp_path / "model"), quantization_config={})
    with pytest.raises(UserError, match="quantised checkpoints"):
        read_config(tmp_path / "model")
