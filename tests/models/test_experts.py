"""Mixtures of experts compute what a loop over tokens does, in one program; padding does not count for the routers."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxcl.functional import LAYER, Unit, soft_masks
from jaxcl.models.experts import Load, balance_loss, route
from jaxcl.models.gates import EarlyGates, Gates
from jaxcl.models.network import Network
from tests.tiny.batches import batch_of
from tests.tiny.networks import llama_config, params_of, row_losses, tiny_llama

EXPERTS, CHOSEN, SIZE, EMBED = 5, 2, 6, 8
MIXTURE: dict[str, Any] = {"num_experts": EXPERTS, "experts_per_token": CHOSEN, "expert_size": SIZE}
SEGMENTS = [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]


def mixture(**changes: Any) -> Network:
    return tiny_llama(**MIXTURE | changes)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def by_loop(params: Any, x: np.ndarray, normalise: bool, gates: Any = None, early: bool = False) -> np.ndarray:
    """Token by token and expert by expert; gates `(intermediate [rows, experts, units], output [rows, embed])`."""
    kernels = {name: np.asarray(params[name]["kernel"], np.float64) for name in ("router", "gate", "up", "down")}
    out = np.zeros_like(x, np.float64)
    for row, place in np.ndindex(x.shape[:2]):
        token = x[row, place].astype(np.float64)
        scores = np.exp(token @ kernels["router"])
        probs = scores / scores.sum()
        chosen = np.argsort(-probs)[:CHOSEN]
        total = probs[chosen].sum() if normalise else 1.0
        for expert in chosen:
            factor = np.ones(SIZE) if gates is None else gates[0][row, expert]
            gated, up = token @ kernels["gate"][expert], token @ kernels["up"][expert]
            inner = silu(gated * factor) * up if early else silu(gated) * up * factor
            out[row, place] += probs[expert] / total * (inner @ kernels["down"][expert])
    return out if gates is None else out * gates[1][:, None]


@functools.partial(jax.jit, static_argnums=0)
def feed_forward(network: Network, layer_params: Any, x: jax.Array, gates: Gates | None = None) -> jax.Array:
    return network.layer(layer_params).mlp(x, gates)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", [None, Gates, EarlyGates])
def test_experts_are_a_loop_over_tokens(kind: Any, normalise: bool) -> None:
    network = mixture(normalise_top_k=normalise)
    params = jax.tree.map(lambda leaf: leaf[1], params_of(network)["blocks"])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 7, EMBED)).astype(np.float32)
    factors = rng.normal(size=(3, EXPERTS, SIZE)), rng.normal(size=(3, EMBED))
    gates = None
    if kind is not None:
        inner, outer = (jnp.asarray(factor.reshape(3, -1), jnp.float32) for factor in factors)
        gates = kind(heads=jnp.ones((3, 4)), intermediate=inner, output=outer)
    found = feed_forward(network, params, x, gates)
    want = by_loop(params["mlp"], x, normalise, None if kind is None else factors, kind is EarlyGates)
    np.testing.assert_allclose(found, want, atol=1e-5)
    # Gates that all rows share.
    if gates is not None:
        shared = dataclasses.replace(gates, intermediate=gates.intermediate[0], output=gates.output[0])
        alike = [np.broadcast_to(factor[:1], factor.shape) for factor in factors]
        want = by_loop(params["mlp"], x, normalise, alike, kind is EarlyGates)
        np.testing.assert_allclose(feed_forward(network, params, x, shared), want, atol=1e-5)


def test_routing_is_float32_whatever_the_activations() -> None:
    network = mixture(compute={"dtype": "bfloat16"}, router_loss_weight=1.0)
    hidden = jax.eval_shape(network.hidden, network.shapes(), batch_of(SEGMENTS))
    assert hidden.states.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(hidden.load)} == {jnp.dtype("float32")}


def test_an_expert_may_take_all_tokens() -> None:
    """Groups of any size: the router sends every token to experts 1 and 3."""
    network = mixture()
    params = params_of(network)
    logits = jnp.zeros((EMBED, EXPERTS)).at[0].set(jnp.array([-9.0, 5.0, -9.0, 4.0, -9.0]))
    own = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    own["mlp"]["router"]["kernel"] = logits
    x = jnp.abs(jax.random.normal(jax.random.key(0), (2, 9, EMBED))) + 0.5
    np.testing.assert_allclose(
        feed_forward(network, own, x), by_loop(own["mlp"], np.asarray(x), normalise=False), atol=1e-5
    )


def test_the_router_loss_is_that_of_real_tokens() -> None:
    network = mixture(router_loss_weight=0.5)
    params, batch = params_of(network), batch_of(SEGMENTS)
    real = np.asarray(SEGMENTS) != 0
    load = jax.jit(lambda batch: network.hidden(params, batch).load)(batch)
    np.testing.assert_array_equal(load.tokens.sum(axis=1), [CHOSEN * real.sum()] * 2)
    np.testing.assert_allclose(load.probs.sum(axis=1), [real.sum()] * 2, rtol=1e-5)
    # Other tokens in the padding, another length and a row more of nothing but padding are no difference.
    wild = jnp.where(jnp.asarray(real), batch.tokens, 7)
    longer = batch_of(
        np.pad(np.asarray(SEGMENTS), ((0, 1), (0, 3))), np.pad(np.asarray(wild), ((0, 1), (0, 3)), constant_values=3)
    )
    again = jax.jit(lambda batch: network.hidden(params, batch).load)(longer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), load, again)


def test_the_router_loss_averages_layers_before_it_multiplies() -> None:
    rng = np.random.default_rng(0)
    load = Load(jnp.asarray(rng.random((3, 4)), jnp.float32), jnp.asarray(rng.random((3, 4)), jnp.float32))
    shares, means = (np.asarray(leaf, np.float64).mean(axis=0) / 7 for leaf in load)
    np.testing.assert_allclose(balance_loss(load, jnp.float32(7)), 4 * np.sum(shares * means), rtol=1e-5)
    assert balance_loss(Load(jnp.zeros((2, 4)), jnp.zeros((2, 4))), jnp.float32(0)) == 0


def test_ties_and_all_experts() -> None:
    probs, chosen, weights = route(jnp.zeros((1, 3)), 3, normalise=False)
    assert chosen.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(weights, probs)


def test_rematerialisation_changes_no_gradient() -> None:
    batch, params = batch_of(SEGMENTS), params_of(mixture())

    def slopes(remat: str) -> Any:
        network = mixture(compute={"remat": remat})
        return jax.jit(jax.grad(lambda params: jnp.sum(row_losses(network, params, batch))))(params)

    want = slopes("none")
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), slopes(remat), want)


def test_gradients_are_those_of_all_experts_on_all_tokens() -> None:
    network = mixture(normalise_top_k=True)
    params = jax.tree.map(lambda leaf: leaf[0], params_of(network)["blocks"])
    x = jax.random.normal(jax.random.key(3), (3, 7, EMBED))
    goal = jax.random.normal(jax.random.key(4), x.shape)

    def densely(mlp: Any, x: jax.Array) -> jax.Array:
        probs, chosen, _ = route(x @ mlp["router"]["kernel"], CHOSEN, normalise=False)
        factors = probs * jnp.sum(jax.nn.one_hot(chosen, EXPERTS), axis=2)
        factors = factors / factors.sum(axis=2, keepdims=True)
        gated, up = (jnp.einsum("bld,edf->blef", x, mlp[name]["kernel"]) for name in ("gate", "up"))
        return jnp.einsum("blef,efd,ble->bld", jax.nn.silu(gated) * up, mlp["down"]["kernel"], factors)

    def grouped(mlp: Any, x: jax.Array) -> jax.Array:
        return feed_forward(network, params | {"mlp": mlp}, x)

    found, want = (
        jax.jit(jax.grad(lambda mlp, x, function=function: jnp.sum(function(mlp, x) * goal), (0, 1)))(params["mlp"], x)
        for function in (grouped, densely)
    )
    assert np.abs(want[0]["router"]["kernel"]).min() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), found, want)


def test_the_program_grows_neither_with_depth_nor_with_experts() -> None:
    batch = batch_of(SEGMENTS)

    def instructions(**changes: Any) -> int:
        network = mixture(router_loss_weight=0.1, **changes)

        def loss(params: Any) -> jax.Array:
            hidden = network.hidden(params, batch)
            return jnp.sum(network.logits(params, hidden.states)) + balance_loss(hidden.load, jnp.float32(11))

        text = jax.jit(jax.value_and_grad(loss)).lower(network.shapes()).as_text()
        return re.sub(r"@\w+", "@function", text).count(" = ")

    assert instructions(num_experts=16) == instructions(num_experts=64, num_layers=8) > 200


def test_units_are_experts_times_intermediate() -> None:
    network = mixture()
    assert network.gates(3).intermediate.shape == (2, 3, EXPERTS * SIZE)
    units = network.units()["blocks"]["mlp"]
    assert units["gate"]["kernel"] == units["up"]["kernel"] == Unit("intermediate", (1, 3))
    assert units["down"]["kernel"] == Unit("output", 3)
    assert units["router"]["kernel"] == Unit(LAYER, 0)
    importance = {
        name: jax.random.uniform(jax.random.key(number), ones.shape)
        for number, (name, ones) in enumerate(vars(network.gates()).items())
    }
    masks = soft_masks(network.units(), network.shapes(), importance)["blocks"]["mlp"]
    assert masks["gate"]["kernel"].shape == (2, EXPERTS, 1, SIZE)
    for layer, expert, unit in np.ndindex(2, EXPERTS, SIZE):
        want = 1 - importance["intermediate"][layer, expert * SIZE + unit]
        assert masks["gate"]["kernel"][layer, expert, 0, unit] == masks["up"]["kernel"][layer, expert, 0, unit] == want
    np.testing.assert_array_equal(masks["down"]["kernel"][:, 0, 0], 1 - importance["output"])
    assert masks["router"]["kernel"] == 1


def test_params_that_a_token_is_computed_with() -> None:
    network = mixture()
    assert network.num_params - network.num_active_params == 2 * (EXPERTS - CHOSEN) * 3 * SIZE * EMBED
    assert tiny_llama().num_active_params == tiny_llama().num_params


def test_experts_that_are_off_leave_no_trace() -> None:
    assert llama_config(num_experts=0, experts_per_token=3, router_loss_weight=0.2) == llama_config()
    assert jax.eval_shape(mixture().hidden, mixture().shapes(), batch_of(SEGMENTS)).load is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 0}, r"experts_per_token: expected 1 to num_experts \(5\), got 0"),
        ({"experts_per_token": 6}, r"experts_per_token: expected 1 to num_experts \(5\), got 6"),
        (
            {"quantise": "int8", "lora": {"targets": ["query"]}},
            "quantise: experts .* are not quantised; allowed is none",
        ),
        ({"mlp_bias": True}, r"mlp_bias: experts .* have no biases"),
        ({"lora": {"targets": ("query", "up", "down")}}, r"lora.targets: experts .* have no adapters, got down, up"),
    ],
)
def test_what_experts_cannot_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        llama_config(**MIXTURE | changes)


def test_an_expert_is_as_wide_as_the_model_says() -> None:
    assert llama_config(**MIXTURE | {"expert_size": 0}).expert_size == 12
