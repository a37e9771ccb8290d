"""Every method has the routers' loss as a term, on rows of a task and on remembered ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.methods.registry import METHODS, find_method
from jaxcl.models.experts import balance_loss
from jaxcl.models.network import Network
from jaxcl.training.privacy import check_private
from tests.tiny.batches import make_batch, make_pairs
from tests.tiny.networks import params_of, tiny_llama

EXPERTS: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2, "expert_size": 6}
MODEL: dict[str, dict[str, Any]] = {
    "olora": {"lora": {"rank": 2}},
    "progressive_prompts": {"soft_tokens": 10},
}
FAST = ("sequential", "das", "seekr", "lwf")
OPTIONS: dict[str, dict[str, Any]] = {
    "das_paper": {"contrast_weight": 0.0},
    "progressive_prompts": {"length": 5},
    "seekr": {"layer_budget": 1, "head_budget": 2, "query_budget": 3},
    "sdft": {"rows": "given"},
}


def method_of(name: str, **model: Any) -> Any:
    network = tiny_llama(**EXPERTS, **MODEL.get(name, {}), **model)
    kind = find_method(name)
    return kind(kind.Options(**OPTIONS.get(name, {})), network, 2)


def loss_of(network: Network, params: Any, batch: Any) -> jax.Array:
    load = network.hidden(params, batch).load
    assert load is not None
    return balance_loss(load, jnp.sum(batch.segments != 0))


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_the_routers_loss_is_a_term(name: str) -> None:
    method = method_of(name, router_loss_weight=0.25)
    params, batch = params_of(method.network), make_pairs([(4, 2), (1, 3), (3, 2)])
    state = method.init(params)
    key = jax.random.key(0)
    batches = [batch]
    if method.replay is not None:
        stored = jax.jit(method.signals)(params, state, batch, key)
        remembered = dataclasses.replace(batch, origin="memory", teacher=stored)
        if name == "agem":  # which compares gradients with those of remembered rows, and learns nothing from them
            assert not method.loss(params, state, remembered, key)
        else:
            batches.append(remembered)

    @jax.jit
    def term_of(params: Any, rows: Any) -> Any:
        term = method.loss(params, state, rows, key)["router"]
        assert term.weight == 0.25
        return term.sum / term.count, term.count

    for rows in batches:
        found, count = term_of(params, rows)
        np.testing.assert_allclose(found, loss_of(method.network, params, batch), rtol=1e-5)
        assert count == 6 + 4 + 5  # real tokens


@pytest.mark.parametrize("name", ["sequential", "das_paper"])
def test_without_weight_there_is_no_term(name: str) -> None:
    method = method_of(name)
    params = method.network.shapes()
    state = jax.eval_shape(method.init, params)
    terms = jax.eval_shape(
        lambda params, state: dict(method.loss(params, state, make_batch(), jax.random.key(0))), params, state
    )
    assert set(terms) == {"loss"}


def test_gradients_of_the_term_reach_the_routers_only_through_probabilities() -> None:
    """Tokens that spread more evenly lower it: a step along its negative gradient."""
    network = tiny_llama(**EXPERTS, router_loss_weight=1.0)
    params, batch = params_of(network), make_batch()
    value, slope = jax.jit(jax.value_and_grad(lambda params: loss_of(network, params, batch)))(params)
    assert np.any(slope["blocks"]["mlp"]["router"]["kernel"] != 0)
    length = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(slope))
    moved = jax.tree.map(lambda leaf, way: leaf - 1e-3 * way / jnp.sqrt(length), params, slope)
    assert loss_of(network, moved, batch) < value


def test_squared_gradients_of_single_examples() -> None:
    """Which are taken under `jax.vmap`, grouped products and all."""
    method = method_of("ewc")
    params, batch = params_of(method.network), make_batch()
    found = jax.jit(lambda params: method.add_fisher(method.no_fisher(params), params, batch))(params).total
    one = jax.jit(lambda params, row: method.add_fisher(method.no_fisher(params), params, row))
    rows = [one(params, jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], batch)).total for n in range(3)]
    for path in ("router", "gate", "down"):
        squares = sum(np.asarray(row["blocks"]["mlp"][path]["kernel"]) for row in rows)
        np.testing.assert_allclose(found["blocks"]["mlp"][path]["kernel"], squares, rtol=1e-4, atol=1e-9)
        assert squares.max() > 0


def test_private_training_refuses_the_routers_loss() -> None:
    """It has no gradient of one example alone."""
    check_private(method_of("sequential"), "sequential")
    with pytest.raises(UserError, match="the loss of sequential compares the examples of a batch"):
        check_private(method_of("sequential", router_loss_weight=0.1), "sequential")
