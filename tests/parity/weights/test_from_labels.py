"""Losses and gradients from the same arrays that transformers takes: token ids, attention mask and labels."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from jaxcl.methods.passes.losses import language_model_loss
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network, Params
from jaxcl.weights import named, save_hf
from tests.parity.weights.both_sides import AUTO, LENGTH, OURS, PAD, REAL, ROWS, TOLERANCE, random_params, tokens

pytestmark = pytest.mark.optimised  # as jaxcl computes for its users


def arrays(causal: bool, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, mask and labels; of a causal row padded on the left, the first token is not to be predicted."""
    rng = np.random.default_rng(3)
    ids, mask = tokens(), REAL.astype(np.int64)
    labels = np.where(REAL & (rng.random((ROWS, LENGTH)) < 0.6), rng.integers(5, 50, (ROWS, LENGTH)), -100)
    if side == "left":
        ids, mask, labels = (
            np.stack([np.roll(r, n) for r, n in zip(a, LENGTH - REAL.sum(1), strict=True)]) for a in (ids, mask, labels)
        )
    if causal:
        labels[np.arange(ROWS), mask.argmax(1)] = -100
    return ids, mask, labels


@pytest.mark.parametrize(
    ("name", "side"),
    [("llama", "right"), ("llama", "left"), ("llama-switches", "left"), ("roberta", "right"), ("bert", "right")],
)
def test_loss_and_gradients_equal_those_of_transformers(name: str, side: str, tmp_path: Path) -> None:
    network = Network.create(OURS[name])
    params = random_params(network)
    save_hf(tmp_path / "model", network, params)
    model = AUTO[name.split("-")[0]].from_pretrained(tmp_path / "model")
    given = arrays(network.causal, side)
    theirs = model(**dict(zip(("input_ids", "attention_mask", "labels"), map(torch.tensor, given), strict=True)))
    theirs.loss.backward()

    @jax.jit
    def gradients(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        def loss(params: Params) -> jax.Array:
            batch = Batch.from_labels(*given, causal=network.causal)
            term = language_model_loss(network, params, network.hidden(params, batch).states, batch, 0)
            return term.sum / term.count

        value, slopes = jax.value_and_grad(loss)(params)
        return value, named(network, slopes)

    ours, found = gradients(params)
    np.testing.assert_allclose(ours, theirs.loss.item(), rtol=1e-5)
    expected = {key: one.grad.numpy() for key, one in model.named_parameters() if one.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        np.testing.assert_allclose(found[key], gradient, **TOLERANCE, err_msg=key)
        # A bias of all keys moves all scores of a row alike, which changes no attention weight.
        assert np.abs(gradient).max() > 1e-4 or key.endswith("key.bias"), key
    assert PAD in given[0]
