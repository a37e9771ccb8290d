import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl.functional.importance import (
    ImportanceSums,
    gate_gradients,
    normalise,
    normalise_quantile,
    normalise_tanh,
)
from jaxcl.functional.losses import scored_states
from jaxcl.methods.passes.importance import Proxy, add_domain_importance, add_general_importance, dropout_divergence
from jaxcl.methods.passes.losses import example_losses
from jaxcl.models.batch import Batch
from jaxcl.models.gates import Gates
from jaxcl.models.network import Network, Params
from tests.tiny.batches import make_batch, pad_batch, take_rows
from tests.tiny.networks import init, log_softmax, tiny_llama, tiny_roberta


@pytest.fixture(scope="module", params=["llama", pytest.param("roberta", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest) -> Network:
    return tiny_llama() if request.param == "llama" else tiny_roberta()


@pytest.fixture(scope="module")
def params(network: Network) -> Params:
    return init(network)


def mean_loss(network: Network, params: Params, batch: Batch, gates: Gates) -> jax.Array:
    """The oracle's loss: mean over a batch of one, with one copy of the gates."""
    states = network.hidden(params, batch, gates=gates).states
    return example_losses(network, params, states, batch, 0)[0]


def single_example_gradients(network: Network, params: Params, batch: Batch) -> list[Gates]:
    ones = network.gates()
    gradient = jax.jit(jax.grad(lambda gates, row: mean_loss(network, params, row, gates)))
    return [gradient(ones, take_rows(batch, [row])) for row in range(batch.size)]


def domain_importance(network: Network, params: Params, batches: list[Batch]) -> Gates:
    add = jax.jit(lambda sums, batch: add_domain_importance(network, sums, params, batch, chunk=0))
    sums = ImportanceSums.zero(network.gates())
    for batch in batches:
        sums = add(sums, batch)
    return sums.mean()


def assert_close(first: Gates, second: Gates) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), first, second)


def test_importance_is_the_mean_absolute_gradient_of_single_examples(network: Network, params: Params) -> None:
    batch = make_batch((6, 4, 5, 0))
    singles = single_example_gradients(network, params, batch)[:3]
    expected = jax.tree.map(lambda *leaves: np.mean(np.abs(np.stack(leaves)), axis=0), *singles)
    found = domain_importance(network, params, [batch])
    assert_close(found, expected)
    signed = jax.tree.map(lambda *leaves: np.abs(np.mean(np.stack(leaves), axis=0)), *singles)
    assert not np.allclose(found.heads, signed.heads, rtol=1e-2)


def test_gate_gradients_equal_finite_differences(network: Network, params: Params) -> None:
    batch = make_batch((6, 4))

    def losses(gates: Gates) -> jax.Array:
        return example_losses(network, params, network.hidden(params, batch, gates=gates).states, batch, 0)

    gradients = jax.jit(lambda: gate_gradients(losses, network.gates(batch.size)))()
    compiled = jax.jit(losses)
    step = 1e-2
    for name, unit in (("heads", 1), ("intermediate", 5), ("output", 3)):
        for layer in range(network.num_layers):
            moved = []
            for sign in (1, -1):
                gates = network.gates(2)
                leaf = getattr(gates, name).at[layer, :, unit].add(sign * step)
                moved.append(compiled(Gates(**{**vars(gates), name: leaf})))
            slope = (np.asarray(moved[0], np.float64) - np.asarray(moved[1])) / (2 * step)
            np.testing.assert_allclose(getattr(gradients, name)[layer, :, unit], slope, rtol=2e-2, atol=2e-3)


def test_batch_size_order_and_padding_change_no_importance(network: Network, params: Params) -> None:
    batch = make_batch((6, 4, 5, 3))
    whole = domain_importance(network, params, [batch])
    assert_close(domain_importance(network, params, [take_rows(batch, [3, 1, 0, 2])]), whole)
    one_by_one = [pad_batch(take_rows(batch, [row]), rows=1, length=2, predict=1) for row in range(4)]
    assert_close(domain_importance(network, params, one_by_one), whole)


def keys_of_passes(batch: Batch, key: jax.Array) -> jax.Array:
    """A key a pass, from the row's task and example."""
    keys = []
    for task, example in zip(batch.task.tolist(), batch.example.tolist(), strict=True):
        keys += list(jax.random.split(jax.random.fold_in(jax.random.fold_in(key, task), example % 2**32)))
    return jnp.stack(keys)


@pytest.mark.parametrize("proxy", ["outputs", "pooled"])
def test_batch_size_order_and_padding_change_no_general_importance(
    network: Network, params: Params, proxy: Proxy
) -> None:
    def importance(batches: list[Batch]) -> Gates:
        sums = ImportanceSums.zero(network.gates())
        for batch in batches:
            sums = add(sums, batch)
        return sums.mean()

    @jax.jit
    def add(sums: ImportanceSums, batch: Batch) -> ImportanceSums:
        return add_general_importance(network, sums, params, batch, jax.random.key(5), 0.2, 2, proxy)

    batch = dataclasses.replace(make_batch((6, 4, 5, 3)), example=jnp.array([3, 0, 7, 1]))
    whole = importance([batch])
    assert_close(importance([take_rows(batch, [3, 1, 0, 2])]), whole)
    one_by_one = [pad_batch(take_rows(batch, [row]), rows=1, length=2, predict=1) for row in range(4)]
    assert_close(importance(one_by_one), whole)
    other = importance([dataclasses.replace(batch, example=jnp.array([3, 0, 7, 2]))])
    assert not np.allclose(other.heads, whole.heads, rtol=1e-3)


def test_divergence_equals_numpy(network: Network, params: Params) -> None:
    batch = make_batch((6, 4, 0))
    twice = take_rows(batch, [0, 0, 1, 1, 2, 2])
    key = jax.random.key(3)
    keys = keys_of_passes(batch, key)
    passes = jax.jit(
        lambda: scored_states(network.hidden(params, twice, dropout_key=keys, dropout_rate=0.2).states, twice.predict)
    )
    logs = log_softmax(np.asarray(network.logits(params, passes())))
    first, second = logs[0::2], logs[1::2]
    divergence = (np.exp(first) * (first - second)).sum(-1)
    weights = np.asarray(batch.weights)
    expected = (divergence * weights).sum(1) / np.maximum(weights.sum(1), 1)
    assert np.all(expected[:2] > 1e-3)
    found = jax.jit(lambda: dropout_divergence(network, params, batch, key, None, 0.2, 2))()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_divergence_of_pooled_states_equals_numpy(network: Network, params: Params) -> None:
    lengths = (6, 4, 0)
    batch, key = make_batch(lengths), jax.random.key(3)
    twice = take_rows(batch, [0, 0, 1, 1, 2, 2])
    keys = keys_of_passes(batch, key)
    states = jax.jit(lambda: network.hidden(params, twice, dropout_key=keys, dropout_rate=0.2).states)()
    expected = [0.0, 0.0, 0.0]
    for row, count in enumerate(lengths[:2]):
        first, second = (log_softmax(np.asarray(states)[2 * row + side, :count].mean(axis=0)) for side in (0, 1))
        expected[row] = (np.exp(first) * (first - second)).sum()
    assert min(expected[:2]) > 1e-4
    found = jax.jit(lambda: dropout_divergence(network, params, batch, key, None, 0.2, 2, "pooled"))()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_divergence_of_equal_passes_is_zero(network: Network, params: Params) -> None:
    found = jax.jit(lambda: dropout_divergence(network, params, make_batch(), jax.random.key(0), None, 0.0, 0))()
    np.testing.assert_allclose(found, 0.0, atol=1e-6)


@pytest.mark.parametrize("proxy", ["outputs", "pooled"])
def test_general_importance_equals_finite_differences(network: Network, params: Params, proxy: Proxy) -> None:
    batch, key, step = make_batch((6, 4)), jax.random.key(3), 1e-2

    def divergence(gates: Gates) -> jax.Array:
        return dropout_divergence(network, params, batch, key, gates, 0.2, 0, proxy)

    compiled = jax.jit(divergence)
    ones = network.gates(2)
    slopes = []
    for unit in range(network.num_heads):
        moved = [
            np.asarray(compiled(Gates(ones.heads.at[0, :, unit].add(sign * step), ones.intermediate, ones.output)))
            for sign in (1, -1)
        ]
        slopes.append((moved[0] - moved[1]) / (2 * step))
    add = jax.jit(lambda sums: add_general_importance(network, sums, params, batch, key, 0.2, 0, proxy))
    sums = add(ImportanceSums.zero(network.gates()))
    assert sums.examples == 2
    np.testing.assert_allclose(sums.total.heads[0], np.abs(slopes).sum(axis=1), rtol=2e-2, atol=1e-3)


def test_mean_without_examples_is_zero() -> None:
    mean = ImportanceSums.zero(tiny_llama().gates()).mean()
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(mean))


scores = st.lists(st.integers(0, 5), min_size=6, max_size=6)


@settings(max_examples=30, deadline=None)
@given(scores)
def test_tanh_equals_numpy(values: list[int]) -> None:
    x = np.array([values, values[::-1]], np.float64)
    deviation = x.std(axis=1, keepdims=True)
    standardised = (x - x.mean(axis=1, keepdims=True)) / np.where(deviation == 0, 1, deviation)
    found = np.asarray(normalise_tanh(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(found, np.abs(np.tanh(standardised)), atol=1e-5)
    assert np.all(found >= 0)
    assert np.all(found <= 1)


@settings(max_examples=30, deadline=None)
@given(scores, st.sampled_from([0.25, 0.5, 1.0]))
def test_quantile_equals_brute_force(values: list[int], share: float) -> None:
    expected = []
    for value in values:
        below = sum(other < value for other in values)
        equal = sum(other == value for other in values)
        rank = (below + equal / 2) / len(values)
        expected.append(max(0.0, (rank - (1 - share)) / share))
    found = normalise_quantile(jnp.array([values], jnp.float32), share)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert float(jnp.max(found)) < 1 + 1e-6


def test_quantile_protects_its_share() -> None:
    layers = jax.random.normal(jax.random.key(0), (3, 200))
    for share in (0.1, 0.5):
        found = np.asarray(normalise_quantile(layers, share))
        np.testing.assert_allclose((found > 0).mean(axis=1), share, atol=0.01)
        np.testing.assert_allclose(found.mean(axis=1), share / 2, atol=0.01)


def test_layers_and_kinds_are_normalised_apart() -> None:
    gates = Gates(jnp.array([[1.0, 2.0], [10.0, 30.0]]), jnp.array([[1.0, 5.0]] * 2), jnp.array([[7.0, 7.0]] * 2))
    found = normalise(gates, "tanh", 0.5)
    np.testing.assert_allclose(found.heads, np.tanh(1.0), rtol=1e-6)
    np.testing.assert_array_equal(found.output, 0.0)
    np.testing.assert_allclose(normalise(gates, "quantile", 0.5).intermediate, [[0.0, 0.5]] * 2)
