from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.methods.ewc import Ewc, EwcOptions
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network
from tests.tiny.batches import StandInTask, make_batch, pad_batch, take_rows
from tests.tiny.networks import init, log_softmax, named, perturbed, tiny_llama, tiny_roberta


@pytest.fixture(scope="module", params=["llama", pytest.param("roberta", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest) -> Network:
    return tiny_llama(num_layers=1) if request.param == "llama" else tiny_roberta(num_layers=1)


def measured(network: Network, params: Any, batches: list[Batch], chunk: int = 512) -> dict[str, np.ndarray]:
    method = Ewc(EwcOptions(loss_chunk=chunk), network, 1)
    add, sums = jax.jit(method.add_fisher), method.no_fisher(params)
    for batch in batches:
        sums = add(sums, params, batch)
    return named(jax.tree.map(np.asarray, sums.mean()))


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, leaf in one.items():
        np.testing.assert_allclose(leaf, other[name], rtol=1e-4, atol=1e-6, err_msg=name)


def row_losses(scores: np.ndarray, batch: Batch) -> np.ndarray:
    """Each example's mean loss over its scored tokens, from scores `[batch, length, vocab]`, in float64."""
    assert batch.predict is not None
    logs = np.take_along_axis(log_softmax(scores), np.asarray(batch.predict)[..., None], 1)
    picked = -np.take_along_axis(logs, np.asarray(batch.targets)[..., None], 2)[..., 0]
    return np.array([np.mean(row[real > 0]) for row, real in zip(picked, batch.weights, strict=True) if real.any()])


def test_the_fisher_is_the_mean_squared_slope_of_single_examples(network: Network) -> None:
    """By central differences, at the params that matter most."""
    params, batch, step = init(network), make_batch((6, 4, 0, 5)), 2e-3
    fisher = measured(network, params, [batch])
    scores = jax.jit(lambda params: network.logits(params, network.hidden(params, batch).states))
    leaves, structure = jax.tree.flatten(params)
    checked = 0
    for number, name in enumerate(fisher):
        at = np.unravel_index(np.argmax(fisher[name]), fisher[name].shape)
        if fisher[name][at] < 1e-3:
            continue

        def moved(by: float, number: int = number, at: Any = at) -> Any:
            changed = [leaf.at[at].add(by) if place == number else leaf for place, leaf in enumerate(leaves)]
            return jax.tree.unflatten(structure, changed)

        above, below = (row_losses(np.asarray(scores(moved(by))), batch) for by in (step, -step))
        slopes = (above - below) / (2 * step)
        assert len(slopes) == 3
        np.testing.assert_allclose(fisher[name][at], np.mean(np.square(slopes)), rtol=0.02, err_msg=name)
        assert np.square(np.mean(slopes)) < fisher[name][at]
        checked += 1
    assert checked > 5


def test_how_examples_are_put_into_batches_changes_nothing(network: Network) -> None:
    params, batch = init(network), make_batch((6, 4, 5, 3))
    whole = measured(network, params, [batch])
    parts = [pad_batch(take_rows(batch, rows), rows=1, length=2, predict=1) for rows in ([2, 1], [3, 0])]
    assert_close(whole, measured(network, params, parts, chunk=1))


def test_the_penalty_is_the_formula(network: Network) -> None:
    method = Ewc(EwcOptions(strength=3.0), network, 1)
    params, batch, key = init(network), make_batch(), jax.random.key(0)
    state = {"anchor": perturbed(params, 0.3), "fisher": jax.tree.map(jnp.square, perturbed(params, 1.0, seed=3))}

    def weighted(params: Any) -> Any:
        term = method.loss(params, state, batch, key)["penalty"]
        return term.weight * term.sum / term.count

    value, gradient = jax.jit(jax.value_and_grad(weighted))(params)
    distance = {
        name: np.asarray(leaf, np.float64) - named(state["anchor"])[name] for name, leaf in named(params).items()
    }
    fisher = named(state["fisher"])
    expected = sum(1.5 * np.sum(fisher[name] * distance[name] ** 2) for name in distance)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, leaf in named(gradient).items():
        np.testing.assert_allclose(leaf, 3.0 * fisher[name] * distance[name], rtol=1e-4, atol=1e-6)


def test_before_the_first_task_there_is_no_penalty(network: Network) -> None:
    method = Ewc(EwcOptions(), network, 1)
    params = init(network)
    terms = jax.jit(method.loss)(perturbed(params, 0.1), method.init(params), make_batch(), jax.random.key(0))
    assert terms["penalty"].sum == 0


def test_the_fisher_of_earlier_tasks_fades_by_decay(network: Network) -> None:
    method = Ewc(EwcOptions(decay=0.25), network, 2)
    first, second = init(network), perturbed(init(network), 0.1)
    one, other = [make_batch()], [make_batch(seed=1)]
    start = method.init(first)
    learned = method.consolidate(first, start, StandInTask(one))
    state = method.consolidate(second, learned, StandInTask(other, index=1))
    alone = [measured(network, params, batches) for params, batches in ((first, one), (second, other))]
    assert_close(named(state["fisher"]), {name: 0.25 * leaf + alone[1][name] for name, leaf in alone[0].items()})
    assert_close(named(state["anchor"]), named(second))
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), state, start)


def test_bfloat16_params_have_a_float32_fisher() -> None:
    network = tiny_llama(num_layers=1)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init(network))
    method = Ewc(EwcOptions(), network, 1)
    state = method.consolidate(params, method.init(params), StandInTask([make_batch()]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state["fisher"])} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state["anchor"])} == {jnp.dtype("bfloat16")}
