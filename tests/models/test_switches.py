"""The decoder's switches: what they compute, what belongs to which unit, and that depth costs no program."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional import LAYER, Unit, soft_masks
from jaxcl.models.layers import RMSNorm
from jaxcl.models.llama_config import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.weights.tree import flatten
from tests.tiny.batches import batch_of
from tests.tiny.families import DECODERS, OWN_MODELS, network_of
from tests.tiny.networks import filled, llama_config, params_of, row_losses, tiny_llama

SEGMENTS = [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]
# Everything that differs from layer to layer, in a pattern of three.
MIXED: dict[str, Any] = {
    "layer_types": ("window", "window", "full"),
    "window": 3,
    "window_rope_theta": 50.0,
    "rotary_layers": (True, False, True),
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "norm_placement": "sandwich",
    "qk_norm": "flat",
    "attention_cap": 2.0,
    "logit_cap": 3.0,
}


@pytest.mark.parametrize("name", DECODERS | OWN_MODELS)
def test_every_param_of_every_family_has_a_unit_and_axes(name: str) -> None:
    adapted = "out" if network_of(name).num_experts else "down"  # experts have no adapters
    network = network_of(name, lora={"targets": ["query", adapted]}, num_labels=2)
    units, axes, shapes = (flatten(tree) for tree in (network.units(), network.axes(), network.shapes()))
    assert set(units) == set(axes) == set(shapes)
    for path, unit in units.items():
        assert len(axes[path]) == len(shapes[path].shape), path
        assert (unit is not None) == path.startswith("blocks/"), path
    # Importance 1 freezes what belongs to a unit, and all else where shared params are frozen too.
    ones = vars(network.gates())
    masks = flatten(soft_masks(network.units(), network.shapes(), ones, "frozen"))
    for path, mask in masks.items():
        assert np.all(np.asarray(mask) == 0), path
        assert jnp.broadcast_shapes(mask.shape, shapes[path].shape) == shapes[path].shape, path


def test_norms_belong_to_the_units_that_they_scale() -> None:
    units = tiny_llama(**MIXED).units()["blocks"]
    assert units["attention"]["query_norm"]["scale"] == units["attention"]["key_norm"]["scale"] == Unit("heads", 1)
    assert units["mlp_post_norm"]["scale"] == Unit("output", 1)
    for norm in ("attention_norm", "attention_post_norm", "mlp_norm"):
        assert units[norm]["scale"] == Unit(LAYER, 0)
    # One vector for all heads belongs to none of them.
    shared = tiny_llama(qk_norm="head").units()["blocks"]["attention"]
    assert shared["query_norm"]["scale"] == shared["key_norm"]["scale"] == Unit(LAYER, 0)


def test_layers_that_differ_cost_no_more_program_with_depth() -> None:
    batch = batch_of(SEGMENTS)

    def program(layers: int) -> str:
        network = tiny_llama(**MIXED, num_layers=layers)
        grad = jax.grad(lambda params: jnp.sum(row_losses(network, params, batch)))
        return jax.jit(grad).lower(network.shapes()).as_text()

    assert program(12).count(" = ") == program(3).count(" = ") > 200


def test_layers_are_what_a_walk_through_them_one_by_one_gives() -> None:
    """A network of layers that differ equals plain networks of one kind of layer, put one after another."""
    network = tiny_llama(**MIXED, num_layers=4, head_dim=6)
    params, batch = params_of(network), batch_of(SEGMENTS)
    kinds = [("window", True), ("window", False), ("full", True), ("window", True)]
    x = network.embed(params, batch)
    for number, (kind, rotated) in enumerate(kinds):
        own = {"layer_types": (kind,), "rotary_layers": (True,)}
        if kind == "full":
            own |= {"window": 0, "window_rope_theta": None}
        one = tiny_llama(**{**MIXED, **own}, head_dim=6)
        layer = jax.tree.map(lambda leaf, number=number: leaf[number], network.blocks(params))
        # At position 0 nothing is rotated.
        placed = batch if rotated else dataclasses.replace(batch, positions=jnp.zeros_like(batch.positions))
        x = one.block(layer._replace(kind=None), x, placed)[0]
    real = np.array(SEGMENTS) != 0
    got = jax.jit(lambda params: network.hidden(params, batch).states)(params)
    np.testing.assert_allclose(got[real], network.finish(params, x)[real], atol=2e-5)


def test_scales_and_caps_are_where_they_belong() -> None:
    plain, params = tiny_llama(), params_of(tiny_llama())
    batch = batch_of(SEGMENTS)
    states = plain.hidden(params, batch).states
    scores = plain.logits(params, states)
    divided = tiny_llama(logit_divisor=4.0, logit_cap=2.0)
    np.testing.assert_allclose(divided.logits(params, states), 2 * np.tanh(scores / 4 / 2), rtol=1e-5)
    scaled = tiny_llama(embedding_scale=3.0)
    np.testing.assert_allclose(scaled.embed(params, batch), 3 * plain.embed(params, batch), rtol=1e-6)
    half = tiny_llama(embedding_scale=8**0.5, compute={"dtype": "bfloat16"})  # rounded, as Gemma does
    vectors = params["embed"]["embedding"][batch.tokens].astype(jnp.bfloat16)
    np.testing.assert_array_equal(half.embed(params, batch), vectors * jnp.bfloat16(8**0.5))
    # A residual scale of almost nothing leaves the embeddings.
    still = tiny_llama(residual_scale=1e-9)
    x, _ = still.block(jax.tree.map(lambda leaf: leaf[0], still.blocks(params)), still.embed(params, batch), batch)
    np.testing.assert_allclose(x, still.embed(params, batch), atol=1e-6)


def test_the_three_scales_of_a_norm() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 4)).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float32)
    plain = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-3)
    weight = np.array([0.5, 1.5, -1.0, 2.0], np.float32)

    def norm(how: Any) -> Any:
        own = RMSNorm({"embed": 4}, eps=1e-3, compute=llama_config().compute, how=how)
        start = np.asarray(own.scale[...])
        own.scale[...] = jnp.asarray(weight)
        return start, own(x)

    def rounded(value: Any) -> Any:
        return jnp.asarray(value).astype(jnp.bfloat16)

    start, out = norm("weight")
    assert start.tolist() == [1.0] * 4
    np.testing.assert_array_equal(out, rounded(plain * weight))
    start, out = norm("one_plus")
    assert start.tolist() == [0.0] * 4
    np.testing.assert_array_equal(out, rounded(plain * (1 + weight)))
    start, out = norm("cast")
    assert start.tolist() == [1.0] * 4
    np.testing.assert_array_equal(out, rounded(plain) * rounded(weight))


def test_a_flat_norm_is_over_all_heads() -> None:
    own = RMSNorm({"heads": 2, "head_dim": 3}, eps=1e-3, compute=llama_config().compute)
    x = np.random.default_rng(0).normal(size=(1, 2, 2, 3)).astype(np.float32)
    np.testing.assert_allclose(own(jnp.asarray(x)), x / np.sqrt((x**2).mean((2, 3), keepdims=True) + 1e-3), rtol=1e-5)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_closed_gates_leave_the_residual_stream_alone(placement: str) -> None:
    """The gate of an output unit is on what is added, so after a norm that comes last."""
    network = tiny_llama(norm_placement=placement, attention_bias=False)
    params, batch = params_of(network), batch_of(SEGMENTS)
    layer = jax.tree.map(lambda leaf: leaf[0], network.blocks(params))
    gates = jax.tree.map(lambda leaf: leaf[0], filled(network, 0.0))
    x = network.embed(params, batch)
    np.testing.assert_allclose(network.block(layer, x, batch, gates=gates)[0], x, atol=1e-6)
    half = jax.tree.map(jnp.ones_like, gates)
    half = type(half)(half.heads, half.intermediate, half.output.at[3].set(0.0))
    whole, without = network.block(layer, x, batch)[0], network.block(layer, x, batch, gates=half)[0]
    changed = np.any(np.asarray(whole != without), axis=(0, 1))
    assert changed.tolist() == [unit == 3 for unit in range(8)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ("window",)}, "window: expected at least 1 where layer_types has window, got 0"),
        ({"rotary_layers": (False,)}, "rotary_layers: expected at least one layer"),
        ({"rotary_share": 0.3, "head_dim": 10}, r"head_dim times rotary_share \(0.3\) must be even .* got 3"),
        (
            {"rope_scaling": {"type": "longrope", "short_factors": (1.0, 2.0), "long_factors": (1.0, 2.0)}},
            "longrope needs a factor for each of 1 pairs of coordinates, got 2",
        ),
    ],
)
def test_fields_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama_config(**changes)


def test_values_that_mean_the_same_are_the_same_configuration() -> None:
    """What is exported and read back must not differ."""
    assert llama_config(attention_out_bias=False) == llama_config()
    assert llama_config(attention_scale=2**-0.5) == llama_config()  # heads of width 2
    assert llama_config(layer_types=("full", "full"), window=7, window_rope_theta=3.0) == llama_config()
    both = llama_config(num_layers=4, layer_types=("window", "full"), window=2, window_rope_theta=10000.0)
    assert both == llama_config(num_layers=4, layer_types=("window", "full") * 2, window=2)
    assert both.windowed == (True, False, True, False)
    assert isinstance(both, LlamaConfig)


def test_an_encoder_sees_later_tokens_and_its_classifier_reads_the_first() -> None:
    network = tiny_llama(causal=False, num_labels=2)
    params, batch = params_of(network), batch_of(SEGMENTS)
    states = network.hidden(params, batch).states
    later = dataclasses.replace(batch, tokens=batch.tokens.at[1, 5].set((batch.tokens[1, 5] + 1) % 13))
    assert np.abs(network.hidden(params, later).states[1, 0] - states[1, 0]).max() > 1e-3
    want = states[:, 0] @ params["classifier"]["out"]["kernel"]
    np.testing.assert_allclose(network.classify(params, states, batch), want, rtol=1e-5)


def test_programs_of_networks_that_differ_in_a_switch_differ() -> None:
    batch = batch_of(SEGMENTS)

    def text(**changes: Any) -> str:
        network: Network = tiny_llama(**changes)
        run = jax.jit(lambda params: network.logits(params, network.hidden(params, batch).states))
        return re.sub(r"@\w+", "@f", run.lower(network.shapes()).as_text())

    plain = text()
    for changes in (
        {"norm_scale": "cast", "compute": {"dtype": "bfloat16"}},
        {"rotary_share": 0.5, "head_dim": 4},
        {"attention_scale": 0.1},
        {"attention_cap": 5.0},
        {"activation": "gelu_tanh"},
        {"residual_scale": 0.5},
        {"attention_bias": True, "attention_out_bias": False},
        {"layer_types": ("window",), "window": 2},
    ):
        assert text(**changes) != plain, changes
