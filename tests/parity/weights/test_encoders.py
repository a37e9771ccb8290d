"""Encoders that are a model of their own, against transformers: logits, attention rows, classes, both ways."""

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
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from jaxcl.functional import attention_maps
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network
from jaxcl.models.probe import Probe
from jaxcl.weights import load_weights, save_hf
from tests.tiny.families import OWN_MODELS, content

pytestmark = pytest.mark.optimised  # as jaxcl computes for its users

PAD, LENGTH = 1, 14  # longer than the windows
REAL = np.arange(LENGTH) < np.array([14, 9, 11])[:, None]


def random_model(name: str, kind: Any, **changes: Any) -> Any:
    """Random in every parameter: biases and norms too."""
    torch.manual_seed(0)
    keys = content(name) | changes
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    model = kind.from_config(config, attn_implementation="eager").eval()  # which gives attention weights
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=sorted(OWN_MODELS))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Network, Any]:
    """Transformers' model, and jaxcl's network and params from its file, with the keys as they were given."""
    folder = tmp_path_factory.mktemp("models") / "model"
    model = random_model(request.param, AutoModelForMaskedLM)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(content(request.param)))
    return (model, *load_weights(folder))


def tokens(left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on one side, and where they are real."""
    real = REAL[:, ::-1] if left else REAL
    return np.where(real, np.random.default_rng(0).integers(5, 50, REAL.shape), PAD), real


def batch(rows: np.ndarray, real: np.ndarray) -> Batch:
    none = jnp.zeros(len(rows), jnp.int32)
    return Batch(
        tokens=jnp.asarray(rows, jnp.int32),
        segments=jnp.asarray(real, jnp.int32),
        positions=jnp.asarray(np.where(real, np.cumsum(real, axis=1) - 1, 0), jnp.int32),
        predict=None,
        targets=jnp.asarray(rows, jnp.int32),
        weights=jnp.ones(rows.shape),
        task=none,
        example=none,
        packed=False,
    )


def theirs(model: Any, rows: np.ndarray, real: np.ndarray, **arguments: Any) -> Any:
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(real.astype(np.int64))}
    with torch.no_grad():
        return model(**inputs, **arguments)


@pytest.mark.parametrize("left", [False, True])
def test_logits_and_attention_rows_are_those_of_transformers(both: Any, left: bool) -> None:
    model, network, params = both
    rows, real = tokens(left)
    out = theirs(model, rows, real, output_attentions=True)
    given = batch(rows, real)
    probe = Probe(lambda view, _: attention_maps(view))
    found = jax.jit(lambda params: network.hidden(params, given, probe=probe))(params)
    logits = out.logits.numpy()
    assert np.std(logits[real]) > 0.05
    np.testing.assert_allclose(network.logits(params, found.states)[real], logits[real], atol=1e-4, rtol=1e-5)
    attentions = np.stack([one.numpy() for one in out.attentions])
    masked = real[None, :, None, :, None]
    assert found.probed.shape == attentions.shape
    np.testing.assert_allclose(np.where(masked, found.probed, 0), np.where(masked, attentions, 0), atol=1e-5)


def test_exported_models_load_in_transformers_with_identical_logits(both: Any, tmp_path: Path) -> None:
    model, network, params = both
    save_hf(tmp_path / "again", network, params, token_ids={"pad_token_id": PAD})
    again, info = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "again", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(model)
    assert not any(info[name] for name in ("missing_keys", "mismatched_keys", "unexpected_keys")), info
    rows, real = tokens()
    np.testing.assert_array_equal(theirs(again.eval(), rows, real).logits, theirs(model, rows, real).logits)


@pytest.mark.parametrize("name", sorted(OWN_MODELS))
def test_a_classifier_goes_there_and_back(name: str, tmp_path: Path) -> None:
    model = random_model(name, AutoModelForSequenceClassification, num_labels=3)
    model.save_pretrained(tmp_path / "model")
    network, params = load_weights(tmp_path / "model", key=jax.random.key(0), fresh_head=True)
    rows, real = tokens()
    given = batch(rows, real)
    logits = theirs(model, rows, real).logits
    assert np.std(logits.numpy()) > 0.05
    ours = network.classify(params, network.hidden(params, given).states, given)
    np.testing.assert_allclose(ours, logits, atol=1e-4, rtol=1e-5)
    save_hf(tmp_path / "again", network, params, token_ids={"pad_token_id": PAD})
    again, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "again", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(model)
    assert not info["missing_keys"]
    np.testing.assert_array_equal(theirs(again.eval(), rows, real).logits, logits)


def test_a_body_alone_and_a_classifier_on_it(tmp_path: Path) -> None:
    """What a masked-LM checkpoint becomes when a classifier is put on it, here and there."""
    for name in ("modernbert", "deberta-v2"):
        model = random_model(name, AutoModelForMaskedLM)
        folder = tmp_path / name
        model.save_pretrained(folder)
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        network, params = load_weights(folder, key=jax.random.key(0), num_labels=2)
        assert network.config.num_labels == 2
        assert type(classifier) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.values()
        body = transformers.AutoModel.from_pretrained(folder)
        body.save_pretrained(folder / "body")
        again, found = load_weights(folder / "body", key=jax.random.key(0), fresh_head=True)
        given = batch(*tokens())
        np.testing.assert_array_equal(again.hidden(found, given).states, network.hidden(params, given).states)
