"""Source-shielded updates against what the matrices are seen to read, and against numpy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.methods.passes.inputs import summed_input_squares
from jaxcl.methods.ssu import Ssu, SsuOptions
from jaxcl.models import layers as layers_module
from jaxcl.models.lora import LoraConfig
from jaxcl.models.product import input_squares, product
from jaxcl.training.optimizer import OptimizerConfig, make_parts
from tests.tiny.batches import StandInTask, make_batch
from tests.tiny.networks import init, llama_config, named, perturbed, tiny_llama, tiny_roberta

BATCH = make_batch((6, 4, 5))
NETWORKS = {"llama": tiny_llama(), "roberta": tiny_roberta(), "remat": tiny_llama(compute={"remat": "full"})}


def seen_inputs(network: Any, params: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Sums of squared inputs by param and layer: every product writes down what it gets, layer by layer."""
    kept: list[tuple[np.ndarray, np.ndarray]] = []

    def watched(x: Any, kernel: Any, contracted: int, dtype: Any = None) -> Any:
        jax.debug.callback(lambda *seen: kept.append((np.asarray(seen[0], np.float64), np.asarray(seen[1]))), x, kernel)
        return product(x, kernel, contracted, dtype)

    monkeypatch.setattr(layers_module, "product", watched)
    real, found = np.asarray(BATCH.segments) != 0, {}
    x = network.embed(params, BATCH)
    for layer in range(network.num_layers):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], network.blocks(params))
        kept.clear()
        x, _ = network.block(one, x, BATCH)
        jax.effects_barrier()
        for name, kernel in named(one.params).items():
            for inputs, used in kept:
                if used.shape == kernel.shape and np.array_equal(used, kernel):
                    found[f"{name}/{layer}"] = np.sum(np.square(inputs[real]), axis=0)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_sums_are_those_of_what_every_matrix_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS[name]
    params = init(network)
    found = named(jax.jit(lambda params: summed_input_squares(network, params, BATCH, 0))(params)["blocks"])
    expected = seen_inputs(network, params, monkeypatch)
    assert len(expected) == len(found) * network.num_layers > 10
    for place, values in expected.items():
        path, _, layer = place.rpartition("/")
        np.testing.assert_allclose(np.ravel(found[path][int(layer)]), np.ravel(values), rtol=1e-4, err_msg=place)


def test_gradients_outside_are_as_always() -> None:
    x, kernel = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.ones((2, 3))

    def slopes(counted: Any) -> Any:
        def loss(x: Any, kernel: Any) -> Any:
            if counted is None:
                return jnp.sum(jnp.sin(product(x, kernel, 1)))
            with input_squares(counted):
                return jnp.sum(jnp.sin(product(x, kernel, 1)))

        return jax.grad(loss, argnums=(0, 1))(x, kernel)

    before, inside, after = slopes(None), slopes(jnp.array([True, False])), slopes(None)
    np.testing.assert_array_equal(inside[1], [[1, 1, 1], [4, 4, 4]])
    np.testing.assert_array_equal(inside[0], before[0])
    jax.tree.map(np.testing.assert_array_equal, before, after)


def rated(leaf: np.ndarray, squares: np.ndarray, outputs: tuple[int, ...]) -> np.ndarray:
    return np.ravel(np.sum(np.abs(np.asarray(leaf, np.float64)), axis=outputs)) * np.sqrt(np.ravel(squares))


def test_the_best_half_of_each_matrix_s_columns_stays() -> None:
    network = NETWORKS["llama"]
    params, batches = init(network), [BATCH, make_batch((5, 6, 2), seed=4)]
    method = Ssu(SsuOptions(share=0.25), network, 2)
    state = method.prepare(params, method.init(params), StandInTask(batches, index=0))
    later = perturbed(params, 0.5)
    state = method.consolidate(later, state, StandInTask([BATCH], index=0))
    moves = method.prepare(later, state, StandInTask([BATCH], index=1))["moves"]

    tokens = [sum(int(np.sum(np.asarray(one.segments) != 0)) for one in group) for group in (batches, [BATCH])]
    first = [named(summed_input_squares(network, params, one, 0)["blocks"]) for one in batches]
    second = named(summed_input_squares(network, later, BATCH, 0)["blocks"])
    compared = 0
    for name, one in named(moves["blocks"]).items():
        squares = np.asarray(first[0][name] + first[1][name]) / tokens[0] + np.asarray(second[name]) / tokens[1]
        side = functools.reduce(lambda node, part: node[part], name.split("/"), network.sides()["blocks"])
        for layer in range(network.num_layers):
            kernel = np.asarray(named(later["blocks"])[name][layer])
            scores = rated(kernel, squares[layer], tuple(axis - 1 for axis in side.outputs))
            best = np.argsort(-scores)[: round(0.25 * len(scores))]
            assert set(np.flatnonzero(np.ravel(one[layer]) == 0)) == set(best), name
            compared += 1
    assert compared > 10


def test_a_step_moves_no_frozen_column_and_everything_else() -> None:
    network = NETWORKS["llama"]
    params = init(network)
    method = Ssu(SsuOptions(), network, 2)
    state = method.prepare(params, method.init(params), StandInTask([BATCH], index=0))
    transform = method.transform(make_parts(OptimizerConfig(weight_decay=0.1)))

    @jax.jit
    def step(params: Any, gradient: Any) -> Any:
        extra = method.update_args(params, state, BATCH, jax.random.key(0))
        found = transform.update(gradient, transform.init(params), params, learning_rate=jnp.float32(0.1), **extra)
        return optax.apply_updates(params, found[0])

    after = named(step(params, perturbed(params, 1.0)))
    moves, held = named(state["moves"]), 0
    for name, leaf in named(params).items():
        changed = np.asarray(after[name] != leaf)
        if name not in moves:
            assert changed.mean() > 0.9, name
            continue
        free = np.broadcast_to(np.asarray(moves[name]) == 1, leaf.shape)
        assert not changed[~free].any(), name
        assert changed[free].mean() > 0.9, name
        held += 1
    assert held > 5


def test_a_model_from_scratch_has_nothing_to_shield() -> None:
    network = NETWORKS["llama"]
    params = init(network)
    method = Ssu(SsuOptions(general_knowledge=False), network, 2)
    state = method.prepare(params, method.init(params), StandInTask([BATCH], index=0))
    assert all(np.all(np.asarray(leaf) == 1) for leaf in jax.tree.leaves(state["moves"]))


def test_adapters_and_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"with model\.lora"):
        Ssu.check(SsuOptions(), llama_config(lora=LoraConfig()))
    with pytest.raises(ValueError, match="experts"):
        Ssu.check(SsuOptions(), llama_config(num_experts=4, experts_per_token=2, expert_size=4))
