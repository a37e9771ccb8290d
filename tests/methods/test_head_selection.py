import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl.functional.heads import HeadSums, combine, normalise_sensitivity, resolve_budget, select_heads
from jaxcl.methods.passes.heads import add_forgettability, add_sensitivity
from jaxcl.methods.passes.losses import example_losses
from jaxcl.models.batch import Batch
from jaxcl.models.compute import Compute
from jaxcl.models.network import Network, Params
from jaxcl.models.probe import Tap
from tests.tiny.batches import make_batch, pad_batch, take_rows
from tests.tiny.networks import init, perturbed, tiny_llama, tiny_roberta


@pytest.fixture(scope="module", params=["llama", pytest.param("roberta", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest) -> Network:
    return tiny_llama() if request.param == "llama" else tiny_roberta()


@pytest.fixture(scope="module")
def params(network: Network) -> Params:
    return init(network)


def sensitivity(network: Network, params: Params, batches: list[Batch], chunk: int = 0) -> HeadSums:
    add = jax.jit(lambda sums, batch: add_sensitivity(network, sums, params, batch, chunk))
    sums = HeadSums.zero(network.num_layers, network.num_heads)
    for batch in batches:
        sums = add(sums, batch)
    return sums


def forgettability(network: Network, before: Params, after: Params, batches: list[Batch]) -> HeadSums:
    add = jax.jit(lambda sums, batch: add_forgettability(network, sums, before, after, batch))
    sums = HeadSums.zero(network.num_layers, network.num_heads)
    for batch in batches:
        sums = add(sums, batch)
    return sums


def seen_pairs(network: Network, batch: Batch) -> np.ndarray:
    """Real, visible (query, key) pairs, by the definition."""
    segments = np.asarray(batch.segments)
    rows, length = segments.shape
    pairs = np.zeros((rows, length, length), bool)
    for row, query, key in itertools.product(range(rows), range(length), range(length)):
        same = segments[row, query] == segments[row, key] != 0
        pairs[row, query, key] = same and (key <= query or not network.causal)
    return pairs


def test_sensitivity_equals_explicit_attention_gradients(network: Network, params: Params) -> None:
    batch = make_batch((6, 4, 0))
    shape = (network.num_layers, batch.size, network.num_heads, 7, 7)

    def losses(change: jax.Array) -> jax.Array:
        tap = Tap(lambda probs, _, change: probs + change, change)
        return example_losses(network, params, network.hidden(params, batch, tap=tap).states, batch, 0)

    maps = np.asarray(jax.jit(jax.grad(lambda change: jnp.sum(losses(change))))(jnp.zeros(shape)), np.float64)
    pairs = seen_pairs(network, batch)
    expected = np.sum(maps**2 * pairs[None, :, None], axis=(1, 3, 4))
    found = sensitivity(network, params, [batch])
    np.testing.assert_allclose(found.total, expected, rtol=1e-4)
    assert found.triples == pairs.sum()
    np.testing.assert_allclose(found.mean(), expected / pairs.sum(), rtol=1e-4)
    # Scores of two positions at a time are worked through one part after the other.
    np.testing.assert_allclose(sensitivity(network, params, [batch], chunk=2).total, found.total, rtol=1e-5)
    # What the authors' code counts too: hidden keys have gradients, which would have changed the result.
    assert not np.allclose(np.sum(maps**2, axis=(1, 3, 4)), expected, rtol=1e-2)

    compiled = jax.jit(losses)
    for place in ((0, 0, 1, 3, 2), (1, 1, 0, 2, 1)):
        step = 2e-3
        up, down = (compiled(jnp.zeros(shape).at[place].set(sign * step)) for sign in (1, -1))
        slope = float(jnp.sum(up) - jnp.sum(down)) / (2 * step)
        np.testing.assert_allclose(maps[place], slope, rtol=2e-2, atol=1e-3)


def test_forgettability_equals_stored_maps(network: Network, params: Params) -> None:
    batch = make_batch((6, 4, 0))
    after = perturbed(params, 0.1)

    def maps(params: Params) -> np.ndarray:
        kept: list[Any] = []
        x = network.embed(params, batch)
        for layer in range(network.num_layers):
            tap = Tap(lambda probs, seen, _: kept.append(probs * seen) or probs)  # type: ignore[func-returns-value]
            layer_params = jax.tree.map(lambda leaf, layer=layer: leaf[layer], network.blocks(params))
            x, _ = network.block(layer_params, x, batch, tap=tap)
        return jnp.stack(kept)

    explicit = jax.jit(maps)
    change = (np.asarray(explicit(params)) - np.asarray(explicit(after))).astype(np.float64)
    pairs = seen_pairs(network, batch)
    expected = np.sum(change**2 * pairs[None, :, None], axis=(1, 3, 4))
    found = forgettability(network, params, after, [batch])
    assert np.all(expected > 0)
    np.testing.assert_allclose(found.total, expected, rtol=1e-4)
    np.testing.assert_allclose(found.mean(), expected / pairs.sum(), rtol=1e-4)
    np.testing.assert_array_equal(forgettability(network, params, params, [batch]).total, 0.0)


def test_batch_size_order_and_padding_change_neither_measure(network: Network, params: Params) -> None:
    batch = make_batch((6, 4, 5, 3))
    after = perturbed(params, 0.1)
    apart = [pad_batch(take_rows(batch, [row]), rows=1, length=2, predict=1) for row in (2, 0, 3, 1)]
    for one, other in (
        (sensitivity(network, params, [batch]), sensitivity(network, params, apart)),
        (forgettability(network, params, after, [batch]), forgettability(network, params, after, apart)),
    ):
        np.testing.assert_allclose(one.total, other.total, rtol=2e-4)
        assert one.triples == other.triples


def test_packed_documents_do_not_see_each_other() -> None:
    network = tiny_llama()
    params = init(network)
    apart = make_batch((3, 4), length=7)
    packed = Batch(
        tokens=jnp.concatenate([apart.tokens[0, :3], apart.tokens[1, :4]])[None],
        segments=jnp.array([[1, 1, 1, 2, 2, 2, 2]]),
        positions=jnp.array([[0, 1, 2, 0, 1, 2, 3]]),
        predict=jnp.array([[0]]),
        targets=jnp.array([[2]]),
        weights=jnp.ones((1, 1)),
        task=jnp.zeros(1, jnp.int32),
        example=jnp.zeros(1, jnp.int32),
    )
    after = perturbed(params, 0.1)
    one, other = (forgettability(network, params, after, [batch]) for batch in (apart, packed))
    np.testing.assert_allclose(one.total, other.total, rtol=1e-4)
    assert one.triples == other.triples == 6 + 10


def test_sensitivity_holds_maps_of_one_layer_only() -> None:
    # Whatever the configuration says of rematerialisation: the program carries no attention map from layer to layer.
    network = tiny_llama(num_layers=3, compute=Compute(remat="none"))
    batch = make_batch((16, 16), length=16)
    zero = HeadSums.zero(network.num_layers, network.num_heads)
    program = jax.make_jaxpr(lambda params: add_sensitivity(network, zero, params, batch, 0))(network.shapes())
    stacked = [
        variable.aval.shape
        for equation in program.jaxpr.eqns
        if equation.primitive.name == "scan"
        for variable in equation.outvars
    ]
    assert stacked
    assert not [shape for shape in stacked if shape[0] == 3 and shape[-2:] == (16, 16)]


def test_normalised_sensitivity_sums_to_one() -> None:
    found = normalise_sensitivity(jnp.array([[1.0, 3.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(found, [[0.25, 0.75], [0.0, 0.0]])


def test_importance_over_tasks() -> None:
    rng = np.random.default_rng(0)
    s, f = rng.uniform(size=(2, 3, 2, 4)).astype(np.float32)
    expected = {
        "product_of_sums": s.sum(0) * f.sum(0),
        "product_of_shares": s.sum(0) * sum(task / task.sum() for task in f),
        "sum_of_products": (s * f).sum(0),
        "sensitivity": s.sum(0),
        "forgettability": f.sum(0),
    }
    for how, value in expected.items():
        np.testing.assert_allclose(combine(jnp.asarray(s), jnp.asarray(f), how), value, rtol=1e-6)  # type: ignore[arg-type]


def test_shares_let_no_task_decide_alone_and_wait_for_those_to_come() -> None:
    s = jnp.array([[[1.0, 1.0, 1.0]]] * 3)
    f = jnp.array([[[0.07, 0.02, 0.01]], [[0.0001, 0.0006, 0.0003]], [[0.0, 0.0, 0.0]]])
    assert combine(s, f, "product_of_sums").argmax() == 0
    np.testing.assert_allclose(combine(s, f, "product_of_shares")[0], 3 * np.array([0.8, 0.8, 0.4]), rtol=1e-5)


def test_budgets() -> None:
    assert resolve_budget(8, 8) == 8
    assert resolve_budget(1, 8) == 1
    assert resolve_budget(1.0, 8) == 8
    assert resolve_budget(0.75, 8) == 6
    assert resolve_budget(0.01, 8) == 1
    for wrong in (9, 0, -1, 1.5, 0.0, -0.5):
        with pytest.raises(ValueError, match=str(wrong)):
            resolve_budget(wrong, 8)


grids = st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(grids, st.sampled_from([(1, 1, 4), (2, 3, 4), (3, 7, 4), (2, 8, 4), (3, 12, 4), (3, 6, 2), (2, 3, 2)]))
def test_selection_equals_brute_force(grid: list[list[int]], budgets: tuple[int, int, int]) -> None:
    layers, heads, per_layer = budgets
    best = max(
        itertools.combinations(range(3), layers), key=lambda some: (sum(sum(grid[i]) for i in some), [-i for i in some])
    )
    # Among layer sets of equal total the single layers decide, first come first.
    by_total = sorted(range(3), key=lambda i: (-sum(grid[i]), i))[:layers]
    assert sum(sum(grid[i]) for i in best) == sum(sum(grid[i]) for i in by_total)

    def allowed(some: tuple[tuple[int, int], ...]) -> bool:
        return all(sum(layer == i for layer, _ in some) <= per_layer for i in by_total)

    pairs = [(layer, head) for layer in sorted(by_total) for head in range(4)]
    most = max(
        sum(grid[layer][head] for layer, head in some) for some in itertools.combinations(pairs, heads) if allowed(some)
    )
    found = np.asarray(select_heads(jnp.array(grid, jnp.float32), layers, heads, per_layer))
    chosen = [tuple(pair) for pair in found.tolist()]
    assert len(set(chosen)) == heads
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(pairs)
    assert allowed(tuple(chosen))
    assert sum(grid[layer][head] for layer, head in chosen) == most


def test_ties_go_to_the_first() -> None:
    assert select_heads(jnp.ones((3, 2)), 2, 3, 2).tolist() == [[0, 0], [0, 1], [1, 0]]
