import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional.soft_masks import Unit, soft_masks
from jaxcl.models.gates import Gates
from jaxcl.models.network import Network
from tests.tiny.batches import make_batch
from tests.tiny.networks import ALL_TARGETS, filled, in_unit, init, named, perturbed, tiny_llama, tiny_roberta
from tests.tiny.stored import masks_of


def random_importance(network: Network, seed: int = 0) -> Gates:
    keys = jax.random.split(jax.random.key(seed), 3)
    ones = network.gates()
    return Gates(*(jax.random.uniform(key, leaf.shape) for key, leaf in zip(keys, jax.tree.leaves(ones), strict=True)))


NETWORKS = {
    "llama": tiny_llama(attention_bias=True, mlp_bias=True, num_labels=3),
    "llama_tied": tiny_llama(tie_embeddings=True, num_kv_heads=4),
    "llama_lora": tiny_llama(lora={"rank": 2, "targets": ALL_TARGETS}),
    "llama_soft_tokens": tiny_llama(soft_tokens=2),
    "roberta": tiny_roberta(num_labels=3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_param_has_a_small_mask_that_broadcasts(name: str) -> None:
    network = NETWORKS[name]
    masks = named(masks_of(network, random_importance(network), "free"))
    for path, leaf in named(network.shapes()).items():
        assert np.broadcast_shapes(masks[path].shape, leaf.shape) == leaf.shape
        assert masks[path].size <= network.num_layers * 12
        assert (masks[path].ndim > 0) == in_unit(path), path
        if not in_unit(path):
            assert masks[path] == 1


def test_masks_equal_loops_over_units() -> None:
    network = NETWORKS["llama"]
    importance = random_importance(network)
    masks = {
        path: np.broadcast_to(mask, named(network.shapes())[path].shape)
        for path, mask in named(masks_of(network, importance, "free")).items()
    }
    heads, inner, outer = (np.asarray(leaf) for leaf in (importance.heads, importance.intermediate, importance.output))
    attention, mlp = "blocks/attention/", "blocks/mlp/"
    for layer in range(2):
        for head in range(4):
            for path in ("query/kernel", "query/bias"):
                np.testing.assert_allclose(masks[attention + path][layer, ..., head, :], 1 - heads[layer, head])
            np.testing.assert_allclose(masks[attention + "out/kernel"][layer, head], 1 - heads[layer, head])
        for kv_head in range(2):
            most = max(heads[layer, 2 * kv_head], heads[layer, 2 * kv_head + 1])
            for path in ("key/kernel", "key/bias", "value/kernel", "value/bias"):
                np.testing.assert_allclose(masks[attention + path][layer, ..., kv_head, :], 1 - most, rtol=1e-6)
        for unit in range(12):
            for path in ("gate/kernel", "gate/bias", "up/kernel", "up/bias"):
                np.testing.assert_allclose(masks[mlp + path][layer, ..., unit], 1 - inner[layer, unit])
        for unit in range(8):
            for path in ("down/kernel", "down/bias"):
                np.testing.assert_allclose(masks[mlp + path][layer, ..., unit], 1 - outer[layer, unit])


@pytest.mark.parametrize("name", ["llama", "llama_lora", "roberta"])
def test_masks_lie_on_what_acts_through_the_unit_alone(name: str) -> None:
    # Close the gates of some units: params that act through them alone then have no gradient. Those are masked.
    network = NETWORKS[name]
    params = perturbed(init(network), 0.1)  # one side of a fresh adapter would be without gradient
    closed = filled(network, 0.0)
    group = network.num_heads // network.num_kv_heads
    closed = Gates(
        closed.heads.at[1, :group].set(1.0), closed.intermediate.at[0, 3].set(1.0), closed.output.at[1, 2].set(1.0)
    )
    gates = jax.tree.map(lambda leaf: 1.0 - leaf, closed)
    batch = make_batch()

    def loss(params: Any) -> jax.Array:
        states = network.hidden(params, batch, gates=gates).states
        return jnp.sum(network.logits(params, states)[..., 0] ** 2)

    gradients = named(jax.jit(jax.grad(loss))(params))
    masks = named(masks_of(network, closed, "free"))
    for path, gradient in gradients.items():
        still = np.broadcast_to(masks[path], gradient.shape) == 0
        assert still.any() == in_unit(path), path
        np.testing.assert_array_equal(np.asarray(gradient)[still], 0.0, err_msg=path)
        if "attention" in path and in_unit(path):
            assert np.all(np.asarray(gradient)[~still] != 0) or "key/bias" in path, path


def test_shared_params_by_choice() -> None:
    network = NETWORKS["roberta"]
    importance = random_importance(network)
    masks = {choice: named(masks_of(network, importance, choice)) for choice in ("free", "mean", "frozen")}
    means = np.mean([np.mean(leaf, axis=1) for leaf in jax.tree.leaves(importance)], axis=0)
    for path in named(network.shapes()):
        if in_unit(path):
            np.testing.assert_array_equal(masks["free"][path], masks["mean"][path])
            np.testing.assert_array_equal(masks["free"][path], masks["frozen"][path])
        else:
            assert masks["free"][path] == 1
            assert masks["frozen"][path] == 0
            expected = means if path.startswith("blocks/") else means.mean()
            np.testing.assert_allclose(masks["mean"][path].squeeze(), 1 - expected, rtol=1e-5)


def test_a_unit_without_importance_is_named() -> None:
    units, params = {"rotary": {"kernel": Unit("phases", 1)}}, {"rotary": {"kernel": jnp.zeros((2, 8))}}
    with pytest.raises(ValueError, match=r"rotary/kernel: no importance of phases, only of heads"):
        soft_masks(units, params, {"heads": jnp.zeros((2, 8))})


def test_groups_of_units_take_their_largest_importance_and_others_are_refused() -> None:
    importance = {"heads": jnp.array([[0.1, 0.4, 0.3, 0.2]])}
    masks = soft_masks({"key": Unit("heads", 1)}, {"key": jnp.zeros((1, 2, 5))}, importance)
    np.testing.assert_allclose(masks["key"], [[[0.6], [0.7]]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"param key: expected 1 layers and 4 heads .* on axis 1, got \(1, 3\)"):
        soft_masks({"key": Unit("heads", 1)}, {"key": jnp.zeros((1, 3))}, importance)


def test_params_of_one_layer_have_the_masks_of_the_stacked_ones() -> None:
    """A model with a list of layers instead of a leading layer axis."""
    network = NETWORKS["llama"]
    units, shapes, importance = network.units(), network.shapes(), vars(random_importance(network))
    for shared in ("free", "mean", "frozen"):
        stacked = soft_masks(units, shapes, importance, shared)["blocks"]
        for layer in range(network.num_layers):
            of_layer = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype), shapes["blocks"])
            own = jax.tree.map(
                lambda _, unit, layer=layer: Unit(unit.kind, unit.axis - 1, layer), shapes["blocks"], units["blocks"]
            )
            alone = soft_masks(own, of_layer, importance, shared)
            for mask, one in zip(jax.tree.leaves(stacked), jax.tree.leaves(alone), strict=True):
                np.testing.assert_array_equal(np.broadcast_to(mask, (2, *mask.shape[1:]))[layer], one)


def test_a_param_of_other_size_is_named() -> None:
    other = dataclasses.replace(tiny_roberta(intermediate_size=10))
    with pytest.raises(ValueError, match="blocks/mlp/up/"):
        masks_of(other, filled(NETWORKS["roberta"], 0.5))
