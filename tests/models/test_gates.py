"""Gates are factors on units: the same as scaling the weights that read them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.gates import EarlyGates, Gates
from jaxcl.models.network import Network, Params
from tests.tiny.batches import batch_of
from tests.tiny.networks import ARCHITECTURES, BUILDERS, llama, params_of, row_losses

SEGMENTS = [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]


def random_gates(network: Network, batch: int | None = None) -> Gates:
    leaves, structure = jax.tree.flatten(network.gates(batch))
    rng = np.random.default_rng(3)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.uniform(0.2, 1.8, x.shape), jnp.float32) for x in leaves])


def with_scaled_weights(params: Params, gates: Gates) -> Params:
    """Params of the network without gates that computes the same."""
    blocks = params["blocks"]
    out, down = blocks["attention"]["out"], blocks["mlp"]["down"]
    down = {**down, "kernel": gates.intermediate[:, :, None] * down["kernel"] * gates.output[:, None, :]}
    if "bias" in down:
        down["bias"] = down["bias"] * gates.output
    blocks = {
        **blocks,
        "attention": {**blocks["attention"], "out": {**out, "kernel": out["kernel"] * gates.heads[:, :, None, None]}},
        "mlp": {**blocks["mlp"], "down": down},
    }
    return {**params, "blocks": blocks}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gates_equal_scaled_weights(architecture: str) -> None:
    network = BUILDERS[architecture]()
    params, batch, gates = params_of(network), batch_of(SEGMENTS), random_gates(BUILDERS[architecture]())
    got = network.hidden(params, batch, gates=gates).states
    want = network.hidden(with_scaled_weights(params, gates), batch).states
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.max(np.abs(got - network.hidden(params, batch).states)) > 1e-2


@pytest.mark.parametrize(("architecture", "before"), [("llama", "gate"), ("roberta", "up"), ("modernbert", "gate")])
def test_early_gates_scale_what_the_activation_reads(architecture: str, before: str) -> None:
    network = BUILDERS[architecture]()
    params, batch, gates = params_of(network), batch_of(SEGMENTS), random_gates(network)
    scaled = with_scaled_weights(params, dataclasses.replace(gates, intermediate=jnp.ones_like(gates.intermediate)))
    mlp = scaled["blocks"]["mlp"]
    part = {
        name: leaf * jnp.expand_dims(gates.intermediate, range(1, leaf.ndim - 1)) for name, leaf in mlp[before].items()
    }
    scaled = {**scaled, "blocks": {**scaled["blocks"], "mlp": {**mlp, before: part}}}
    got = network.hidden(params, batch, gates=EarlyGates(**vars(gates))).states
    np.testing.assert_allclose(got, network.hidden(scaled, batch).states, atol=1e-5)
    assert np.max(np.abs(got - network.hidden(params, batch, gates=gates).states)) > 1e-2


def test_early_gates_of_each_example_have_gradients_of_their_own() -> None:
    network = llama()
    params, batch = params_of(network), batch_of(SEGMENTS)
    loss = jax.jit(lambda gates: row_losses(network, params, batch, gates=gates))
    gates = EarlyGates(**vars(network.gates(3)))
    gradient = jax.jit(jax.grad(lambda gates: jnp.sum(loss(gates))))(gates)
    place, step = (1, 0, 5), 1e-2
    up, down = (
        loss(dataclasses.replace(gates, intermediate=gates.intermediate.at[place].add(d))) for d in (step, -step)
    )
    np.testing.assert_allclose((up - down)[0] / (2 * step), gradient.intermediate[place], rtol=2e-2, atol=1e-3)
    assert abs(gradient.intermediate[place]) > 1e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [None, 3])
def test_gates_of_one_change_nothing(architecture: str, rows: int | None) -> None:
    network = BUILDERS[architecture]()
    params, batch = params_of(network), batch_of(SEGMENTS)
    got = network.hidden(params, batch, gates=network.gates(rows)).states
    np.testing.assert_allclose(got, network.hidden(params, batch).states, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_of_each_examples_own_gates_equal_a_loop(architecture: str, remat: str) -> None:
    network = BUILDERS[architecture](compute={"remat": remat})
    params, batch = params_of(network), batch_of(SEGMENTS)

    def total(gates: Gates, batch: Any) -> jax.Array:
        return jnp.sum(row_losses(network, params, batch, gates=gates))

    at_once = jax.jit(jax.grad(total))(network.gates(3), batch)
    one_at_a_time = jax.jit(jax.grad(total))
    for row in range(3):
        names = {field.name for field in dataclasses.fields(batch)}
        arrays = {name: getattr(batch, name) for name in names if isinstance(getattr(batch, name), jax.Array)}
        alone = dataclasses.replace(batch, **{name: array[row : row + 1] for name, array in arrays.items()})
        want = one_at_a_time(network.gates(), alone)
        for name in ("heads", "intermediate", "output"):
            got = getattr(at_once, name)[:, row]
            np.testing.assert_allclose(got, getattr(want, name), atol=2e-5, err_msg=name)
            assert np.max(np.abs(got)) > 1e-3


def test_gradient_of_a_gate_is_the_finite_difference() -> None:
    network = llama()
    params, batch = params_of(network), batch_of(SEGMENTS)
    loss = jax.jit(lambda gates: row_losses(network, params, batch, gates=gates))
    gates = network.gates(3)
    gradient = jax.jit(jax.grad(lambda gates: jnp.sum(loss(gates))))(gates)
    step = 1e-2
    for name, place in (("heads", (0, 1, 2)), ("intermediate", (1, 0, 5)), ("output", (0, 2, 7))):
        up, down = (
            loss(dataclasses.replace(gates, **{name: getattr(gates, name).at[place].add(d)})) for d in (step, -step)
        )
        slope = (up - down) / (2 * step)
        np.testing.assert_allclose(slope[place[1]], getattr(gradient, name)[place], rtol=2e-2, atol=1e-3)
        others = np.delete(slope, place[1])
        np.testing.assert_allclose(others, 0, atol=1e-4)
