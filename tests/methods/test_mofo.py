"""The largest moments against sorting, and a step against optax's own Adam."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.functional.largest_moments import largest_entries
from jaxcl.methods.mofo import Mofo, MofoOptions
from jaxcl.training.optimizer import OptimizerConfig, make_parts
from tests.tiny.networks import init, named, perturbed, tiny_llama

RANDOM = np.random.default_rng(5)


@pytest.mark.parametrize("share", [0.01, 0.15, 0.5, 1.0])
def test_entries_are_those_that_sorting_puts_first(share: float) -> None:
    values = (RANDOM.normal(size=(3, 5, 8)) * 10.0 ** RANDOM.integers(-30, 30, (3, 5, 8))).astype(np.float32)
    found = np.asarray(largest_entries(jnp.asarray(values), (1, 2), share))
    count = max(1, round(share * 40))
    for mask, layer in zip(found, values, strict=True):
        chosen = np.argsort(-np.abs(layer).ravel())[:count]
        assert sorted(np.flatnonzero(mask)) == sorted(chosen)


def test_entries_that_are_equal_are_chosen_together() -> None:
    assert largest_entries(jnp.array([2.0, -2.0, 1.0]), (0,), 0.34).tolist() == [True, True, False]
    assert largest_entries(jnp.zeros(3), (0,), 0.34).tolist() == [True, True, True]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_a_step_is_the_optimizers_at_the_largest_moments(name: str) -> None:
    network = tiny_llama()
    params = init(network)
    config = OptimizerConfig(name=name, weight_decay=0.1)  # type: ignore[arg-type]
    parts = make_parts(config)
    mine, plain = Mofo(MofoOptions(share=0.2), network, 2).transform(parts), parts.chain()
    state, expected_state = mine.init(params), plain.init(params)
    moments = {leaf: np.zeros(value.shape) for leaf, value in named(params).items()}
    for seed in range(3):
        gradient = perturbed(jax.tree.map(jnp.zeros_like, params), 1e-3, seed)
        updates, state = jax.jit(mine.update)(gradient, state, params, learning_rate=jnp.float32(0.1))
        expected, expected_state = plain.update(gradient, expected_state, params, learning_rate=jnp.float32(0.1))
        decay = {"adamw": (0.9, 0.1), "sgd": (0.9, 1.0), "lion": (0.999, 0.001)}[name]
        found, wanted = named(updates), named(expected)
        for leaf, slope in named(gradient).items():
            moments[leaf] = decay[0] * moments[leaf] + decay[1] * np.asarray(slope, np.float64)
            layers = moments[leaf] if leaf.startswith("blocks/") else moments[leaf][None]
            for number, layer in enumerate(layers):
                pick = (lambda tree, number=number: tree[number]) if leaf.startswith("blocks/") else (lambda tree: tree)
                count = max(1, round(0.2 * layer.size))
                threshold = np.sort(np.abs(layer).ravel())[-count] * (1 - 1e-5)
                want: Any = np.where(np.abs(layer) >= threshold, pick(np.asarray(wanted[leaf])), 0.0)
                np.testing.assert_allclose(pick(np.asarray(found[leaf])), want, rtol=1e-5, atol=1e-9, err_msg=leaf)


@pytest.mark.parametrize("config", [OptimizerConfig(name="rmsprop"), OptimizerConfig(name="sgd", b1=0.0)])
def test_an_optimizer_without_moment_is_refused(config: OptimizerConfig) -> None:
    with pytest.raises(UserError, match="first moment"):
        Mofo(MofoOptions(), tiny_llama(), 2).transform(make_parts(config))
