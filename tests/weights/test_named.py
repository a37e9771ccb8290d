"""Trees by the names of a checkpoint, without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxcl.functional import soft_masks
from jaxcl.models.network import Network
from jaxcl.models.trainable import trained
from jaxcl.weights import named, save_hf, save_peft
from tests.tiny.networks import CONFIGS, LORA, random_params, tiny_llama

NETWORK = tiny_llama()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_params_are_the_tensors_of_the_file(name: str, tmp_path: Path) -> None:
    network = Network.create(CONFIGS[name])
    params = random_params(network)
    save_hf(tmp_path / "model", network, params)
    file, found = load_file(tmp_path / "model" / "model.safetensors"), jax.jit(lambda p: named(network, p))(params)
    assert found.keys() == file.keys()
    for tensor, value in file.items():
        np.testing.assert_array_equal(found[tensor], value, err_msg=tensor)


def test_adapters_alone_have_the_names_of_peft(tmp_path: Path) -> None:
    network = tiny_llama(lora=LORA)
    params = random_params(network)
    save_peft(tmp_path / "adapter", network, params)
    file, found = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), named(network, trained(params))
    assert found.keys() == file.keys()
    for tensor, value in file.items():
        np.testing.assert_array_equal(found[tensor], value, err_msg=tensor)
    whole = named(network, params)
    assert whole.keys() > found.keys()
    np.testing.assert_array_equal(whole["model.norm.weight"], params["final_norm"]["scale"])


def test_masks_are_spread_over_their_params() -> None:
    rng = np.random.default_rng(0)
    importance = {name: jnp.asarray(rng.uniform(size=leaf.shape)) for name, leaf in vars(NETWORK.gates()).items()}
    masks = soft_masks(NETWORK.units(), NETWORK.shapes(), importance, "mean")
    found = named(NETWORK, masks)
    depth, layer = NETWORK.head_dim, "model.layers.1."
    heads, wide = 1 - np.asarray(importance["heads"][1]), (NETWORK.num_heads * depth, NETWORK.hidden_size)
    np.testing.assert_allclose(
        found[layer + "self_attn.q_proj.weight"], np.broadcast_to(np.repeat(heads, depth)[:, None], wide), rtol=1e-6
    )
    np.testing.assert_allclose(
        found[layer + "self_attn.o_proj.weight"], np.broadcast_to(np.repeat(heads, depth), wide[::-1]), rtol=1e-6
    )
    assert found["model.embed_tokens.weight"].shape == (NETWORK.vocab_size, NETWORK.hidden_size)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"blocks": {"mlp": {"sideways": {"kernel": np.ones(1)}}}}, "has no param blocks/mlp/sideways/kernel"),
        ({"final_norm": {"scale": np.ones(3)}}, r"final_norm/scale has shape \[3\].*does not broadcast to \[8\]"),
    ],
)
def test_what_is_not_of_the_network_is_an_error(tree: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named(NETWORK, tree)
