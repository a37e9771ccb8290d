"""Checkpoints exchanged with transformers, in both directions: the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxcl.models.network import Network
from jaxcl.weights import convert, load_weights, save_hf, save_orbax
from tests.parity.weights.both_sides import AUTO, OURS, PAD, check, outputs_of_transformers, random_params

pytestmark = pytest.mark.optimised  # as jaxcl computes for its users

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
}
DECODER = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ENCODER = SMALL | {"max_position_embeddings": 40, "hidden_dropout_prob": 0.0}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"head_dim": 16}),
    "llama-3": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
    "llama-linear": (
        "LlamaForCausalLM",
        "LlamaConfig",
        DECODER | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama-body": ("LlamaModel", "LlamaConfig", DECODER),
    "llama-labels": ("LlamaForSequenceClassification", "LlamaConfig", DECODER | {"num_labels": 5}),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": None}),
    "mistral-wide-window": ("MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": 64}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", ENCODER | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "roberta-tanh": ("RobertaForMaskedLM", "RobertaConfig", ENCODER | {"hidden_act": "gelu_new"}),
    "roberta-body": ("RobertaModel", "RobertaConfig", ENCODER),
    "roberta-labels": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER | {"num_labels": 2}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", ENCODER | {"type_vocab_size": 1}),
    "xlm-roberta-labels": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", ENCODER | {"num_labels": 3}),
    "eurobert": ("EuroBertForMaskedLM", "EuroBertConfig", DECODER | {"attention_bias": True}),
    "eurobert-tied": ("EuroBertForMaskedLM", "EuroBertConfig", DECODER | {"head_dim": 16, "tie_word_embeddings": True}),
    "bert": ("BertForMaskedLM", "BertConfig", ENCODER),
    "bert-relu": ("BertForMaskedLM", "BertConfig", ENCODER | {"hidden_act": "relu"}),
    "bert-pretraining": ("BertForPreTraining", "BertConfig", ENCODER),
    "bert-body": ("BertModel", "BertConfig", ENCODER),
    "bert-labels": ("BertForSequenceClassification", "BertConfig", ENCODER | {"num_labels": 3}),
}


def random_model(name: str, config: Any) -> torch.nn.Module:
    """Random in every parameter: biases and norms too, which transformers starts at 0 and 1."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_saved_by_transformers_load_with_equal_outputs(name: str, tmp_path: Path) -> None:
    kind, config_kind, fields = MODELS[name]
    model = random_model(kind, getattr(transformers, config_kind)(**fields))
    model.save_pretrained(tmp_path / "model", max_shard_size="20kB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    # A body alone and a classifier come without the head that predicts tokens.
    lacks_head = kind.endswith(("Model", "ForSequenceClassification"))
    key = jax.random.key(0) if lacks_head else None
    network, params = load_weights(tmp_path / "model", key=key, fresh_head=lacks_head)
    check(outputs_of_transformers(model), network, params)


@pytest.mark.parametrize("name", ["llama-3", "llama-linear"])
def test_rotary_settings_by_their_older_names_are_the_same(name: str, tmp_path: Path) -> None:
    model = random_model("LlamaForCausalLM", transformers.LlamaConfig(**MODELS[name][2]))
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    settings = content.pop("rope_parameters")
    older = {"rope_theta": settings.pop("rope_theta"), "rope_scaling": settings}
    path.write_text(json.dumps(content | older))
    check(outputs_of_transformers(model), *load_weights(tmp_path / "model"))


@pytest.mark.parametrize("equal", [False, True])
def test_a_decoder_with_two_heads_is_what_transformers_makes_of_it(equal: bool, tmp_path: Path) -> None:
    """The configuration says tied; the file has a head of its own, which differs from the embedding or does not."""
    _, _, fields = MODELS["llama"]
    model = random_model("LlamaForCausalLM", transformers.LlamaConfig(**fields, tie_word_embeddings=False))
    if equal:
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    network, params = load_weights(tmp_path / "model")
    assert network.config.tie_embeddings == equal
    check(outputs_of_transformers(theirs), network, params)


@pytest.mark.parametrize("name", sorted(OURS))
def test_exported_models_load_in_transformers_with_equal_outputs(name: str, tmp_path: Path) -> None:
    network = Network.create(OURS[name])
    params = random_params(network)
    save_hf(tmp_path / "model", network, params, token_ids={"pad_token_id": PAD}, file_bytes=20000)
    kinds = [AUTO[name.split("-")[0]]]
    if network.config.num_labels:
        kinds.append(transformers.AutoModelForSequenceClassification)
    for kind in kinds:
        model, info = kind.from_pretrained(tmp_path / "model", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        if not network.config.num_labels:
            assert not info["unexpected_keys"]
        assert model.dtype == torch.float32
        found = outputs_of_transformers(model.eval())
        check(found, network, params)


def test_bfloat16_export_loads_as_bfloat16(tmp_path: Path) -> None:
    network = Network.create(OURS["llama"])
    params = random_params(network)
    save_hf(tmp_path / "model", network, params, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    check(outputs_of_transformers(model.float().eval()), network, rounded)


def test_conversion_of_a_transformers_model_through_orbax_and_back(tmp_path: Path) -> None:
    kind, config_kind, fields = MODELS["llama-3"]
    config = getattr(transformers, config_kind)(**fields, bos_token_id=7, eos_token_id=[8, 9])
    model = random_model(kind, config)
    model.save_pretrained(tmp_path / "a")
    network, params = load_weights(tmp_path / "a")
    save_orbax(tmp_path / "b", network, params)
    convert(tmp_path / "b", tmp_path / "c")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    np.testing.assert_array_equal(outputs_of_transformers(again)["logits"], outputs_of_transformers(model)["logits"])
    convert(tmp_path / "a", tmp_path / "d")
    carried = transformers.AutoConfig.from_pretrained(tmp_path / "d")
    assert (carried.bos_token_id, carried.eos_token_id) == (7, [8, 9])


@pytest.mark.parametrize("name", ["bert-labels", "roberta-labels", "xlm-roberta-labels", "llama-labels"])
def test_conversion_of_a_classifier(name: str, tmp_path: Path) -> None:
    kind, config_kind, fields = MODELS[name]
    model = random_model(kind, getattr(transformers, config_kind)(**fields))
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    assert type(again) is type(model)
    np.testing.assert_array_equal(outputs_of_transformers(again)["logits"], outputs_of_transformers(model)["logits"])
