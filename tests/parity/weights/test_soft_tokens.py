"""Soft tokens as transformers' models compute with vectors in place of tokens (`inputs_embeds`)."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxcl.models.batch import Batch
from jaxcl.models.network import Network
from jaxcl.weights import save_hf
from tests.parity.weights.both_sides import AUTO, OURS, PAD, random_params

pytestmark = pytest.mark.optimised  # as jaxcl computes for its users


def test_logits_behind_a_soft_prompt(tmp_path: Path) -> None:
    network = Network.create(type(OURS["llama"]).model_validate({**OURS["llama"].model_dump(), "soft_tokens": 5}))
    params = random_params(network)
    base = {name: leaf for name, leaf in params.items() if name != "soft_tokens"}
    save_hf(tmp_path / "base", Network.create(OURS["llama"]), base, token_ids={"pad_token_id": PAD})
    model = AUTO["llama"].from_pretrained(tmp_path / "base").eval()

    prompt, words = [3, 4, 0, 1], np.random.default_rng(0).integers(3, network.vocab_size, (2, 6))
    soft = torch.tensor(np.asarray(params["soft_tokens"]["embedding"]))[prompt]
    with torch.no_grad():
        vectors = torch.cat([soft.expand(2, -1, -1), model.get_input_embeddings()(torch.tensor(words))], dim=1)
        expected = model(inputs_embeds=vectors).logits.numpy()

    tokens = jnp.asarray(np.concatenate([np.tile(-1 - np.array(prompt), (2, 1)), words], axis=1), jnp.int32)
    ones, row = jnp.ones_like(tokens), jnp.arange(2, dtype=jnp.int32)
    positions = jnp.tile(jnp.arange(10, dtype=jnp.int32), (2, 1))
    batch = Batch(tokens, ones, positions, None, tokens, ones.astype(jnp.float32), row, row)
    found = network.logits(params, network.hidden(params, batch).states)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
