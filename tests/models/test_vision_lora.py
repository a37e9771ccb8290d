"""Adapters of tower and connector against kernels that hold their product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxcl.methods.olora import Olora, OloraOptions
from jaxcl.models.lora import VISION_TARGETS, LoraConfig, adapted, fold
from jaxcl.models.network import Network, Params
from jaxcl.models.trainable import overlay, trained
from jaxcl.weights.tree import flatten
from tests.tiny.networks import init, params_of, row_losses, tiny_llama, tiny_roberta
from tests.tiny.seeing import batch, images_of, seeing

LORA = {"rank": 3, "alpha": 5.0, "targets": VISION_TARGETS}
TOWER = "vision/tower/blocks"


def network_of(**changes: Any) -> Network:
    return seeing({"lora": {**LORA, **changes}}, init_std=0.3)


@pytest.fixture(scope="module")
def network() -> Network:
    return network_of()


@pytest.fixture(scope="module")
def params(network: Network) -> Params:
    return params_of(network)


def losses(network: Network, params: Params) -> np.ndarray:
    given = batch(images_of([[0, 1], [1]], 2))
    return np.asarray(jax.jit(lambda params: row_losses(network, params, given))(params))


def merged(params: Any, name: str = "") -> Any:
    """Plain params that hold every adapter's product, in NumPy; only the connector's have no axis of layers."""
    if not isinstance(params, dict):
        return params
    if "lora_a" not in params:
        return {key: merged(node, key) for key, node in params.items()}
    kernel, a, b = (np.asarray(params[key], np.float64) for key in ("kernel", "lora_a", "lora_b"))
    if name == "connector":
        product = a @ b
    else:
        product = np.stack([one.reshape(-1, 3) @ other.reshape(3, -1) for one, other in zip(a, b, strict=True)])
    rest = {key: leaf for key, leaf in params.items() if key not in ("kernel", "lora_a", "lora_b")}
    return {**rest, "kernel": jnp.asarray(kernel + 5 / 3 * product.reshape(kernel.shape), jnp.float32)}


def test_adapters_compute_what_their_products_in_the_kernels_would(network: Network, params: Params) -> None:
    plain = seeing(init_std=0.3)
    np.testing.assert_allclose(losses(network, params), losses(plain, merged(params)), rtol=2e-5)
    base = {path: leaf for path, leaf in flatten(params).items() if "lora" not in path}
    assert base.keys() == flatten(plain.shapes()).keys()
    # Each of them counts.
    for path, leaves in adapted(params):
        without = overlay(params, nested(path, {"lora_b": jnp.zeros_like(leaves["lora_b"])}))
        moves = np.abs(losses(network, without) - losses(network, params)).max()
        assert (moves > 1e-4) or path.endswith("key"), path


def nested(path: str, leaves: Params) -> Params:
    for name in reversed(path.split("/")):
        leaves = {name: leaves}
    return leaves


def test_fresh_adapters_change_neither_the_network_nor_its_draws(network: Network) -> None:
    found, base = flatten(init(network)), flatten(init(seeing(init_std=0.3)))
    own = {f"{TOWER}/{name}" for name in ("query", "key", "value", "out", "up", "down")} | {"vision/connector"}
    assert found.keys() - base.keys() == {f"{path}/{side}" for path in own for side in ("lora_a", "lora_b")}
    for path, leaf in base.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    assert not np.any(found["vision/connector/lora_b"])
    assert flatten(trained(init(network))).keys() == found.keys() - base.keys()
    axes = flatten(network.axes())
    assert axes[f"{TOWER}/query/lora_b"] == ("tower_layers", "rank", "heads", "head_dim")
    assert axes["vision/connector/lora_a"] == (None, "rank")
    units = flatten(network.units())
    assert units[f"{TOWER}/up/lora_b"].kind == "tower_intermediate"
    assert units["vision/connector/lora_b"] == ("connector_output", 1, 0)


def test_the_towers_adapters_are_chosen_apart_from_the_decoders() -> None:
    found = flatten(network_of(targets=["query", "tower_up"]).shapes())
    assert sorted(path for path in found if "lora_a" in path) == ["blocks/attention/query/lora_a", f"{TOWER}/up/lora_a"]


def test_folding_changes_the_split_and_not_the_network(network: Network, params: Params) -> None:
    assert network.config.lora is not None
    lora = network.config.lora
    folded = overlay(params, jax.jit(lambda: fold(params, lora, jax.random.key(1)))())
    np.testing.assert_allclose(losses(network, folded), losses(network, params), rtol=2e-5)
    assert not np.any(folded["vision"]["connector"]["lora_b"])
    assert np.std(folded["vision"]["connector"]["lora_a"]) == pytest.approx((3 * 32) ** -0.5, rel=0.2)


def test_directions_of_the_connector_are_compared_as_a_whole(network: Network, params: Params) -> None:
    method = Olora(OloraOptions(), network, 2)
    state = method.keep(method.init(params), method.init(params)["past"] and directions(params), jnp.int32(0))
    assert state["past"]["vision/connector"].shape == (2, 1, 32, 3)
    terms = method.loss(params, state, batch(images_of([[0, 1], [1]], 2)), jax.random.key(0))
    expected = 0.0
    for _, leaves in adapted(params):
        a = np.asarray(leaves["lora_a"], np.float64)
        a = a[None] if a.ndim == 2 else a.reshape(len(a), -1, 3)
        expected += np.sum(np.square(np.einsum("lij,lik->ljk", a, a)))
    np.testing.assert_allclose(terms["orthogonality"].sum, expected, rtol=1e-4)


def directions(params: Params) -> dict[str, Any]:
    return {
        path: leaves["lora_a"] if path != "vision/connector" else leaves["lora_a"][None]
        for path, leaves in adapted(params)
    }


def test_models_that_lack_a_projection_refuse_adapters_of_it() -> None:
    lora = LoraConfig(targets=("query", "tower_out", "connector"))
    lacking, allowed = "has no tower_out, connector", "query, key, value, out, gate, up, down"
    with pytest.raises(ValidationError, match=rf"a model without vision {lacking}; allowed are {allowed} \["):
        tiny_llama(lora=lora)
    with pytest.raises(ValidationError, match=rf"an encoder {lacking}; allowed are {allowed.replace('gate, ', '')} \["):
        tiny_roberta(lora=lora)
