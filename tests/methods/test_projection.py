"""Updates that leave something out, against numpy: A-GEM's gradients, and the subspaces of OSFT."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.functional.projection import leading_directions, outside, without_conflict
from jaxcl.functional.row_column import Sides
from jaxcl.methods.agem import Agem, AgemOptions
from jaxcl.methods.osft import Osft, OsftOptions
from jaxcl.methods.passes.losses import language_model_terms
from jaxcl.models.lora import LoraConfig
from jaxcl.training.optimizer import OptimizerConfig, make_parts
from tests.tiny.batches import StandInTask, make_batch
from tests.tiny.networks import init, llama_config, named, perturbed, tiny_llama

RANDOM = np.random.default_rng(3)
MATRIX = RANDOM.normal(size=(5, 7)).astype(np.float32)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


# A-GEM


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_conflicting_gradient_becomes_the_nearest_that_does_not_conflict(sign: float) -> None:
    gradient, reference = (
        {"a": jnp.asarray(RANDOM.normal(size=(2, 3))), "b": jnp.asarray(RANDOM.normal(size=4))} for _ in range(2)
    )
    if np.dot(flat(gradient), flat(reference)) * sign < 0:
        reference = jax.tree.map(jnp.negative, reference)
    found = without_conflict(gradient, reference)
    g, r = flat(gradient), flat(reference)
    want = g if sign > 0 else g - r * (g @ r) / (r @ r)
    np.testing.assert_allclose(flat(found), want, rtol=1e-5, atol=1e-6)
    assert flat(found) @ r > -1e-5


def test_without_a_reference_gradient_nothing_changes() -> None:
    gradient = jnp.array([1.0, -2.0])
    np.testing.assert_array_equal(without_conflict(gradient, jnp.zeros(2)), gradient)


def test_agem_steps_against_no_remembered_gradient() -> None:
    """One step of plain gradient descent, by hand: the remembered loss does not rise, and nothing is learned of it."""
    network = tiny_llama(num_layers=1)
    params = init(network)
    method = Agem(AgemOptions(), network, 2)
    memory = make_batch((6, 5), seed=1, origin="memory")
    batch = make_batch((6, 4), seed=2)
    key = jax.random.key(0)

    def gradient(batch: Any) -> Any:
        def loss(params: Any) -> Any:
            term = language_model_terms(network, params, batch, key, 0)["loss"]
            return term.sum / term.count

        return jax.jit(jax.grad(loss))(params)

    own, reference = gradient(batch), gradient(memory)
    # The task's gradient of the opposite of what is remembered, and a part of its own.
    against = jax.tree.map(lambda one, other: 0.3 * one - 2.0 * other, own, reference)
    assert flat(against) @ flat(reference) < 0
    extra = jax.jit(method.update_args)(params, {}, make_batch((6, 4), seed=2, memory=memory), key)
    np.testing.assert_allclose(flat(extra["reference"]), flat(reference), rtol=1e-4, atol=1e-6)
    transform = method.transform(make_parts(OptimizerConfig(name="sgd", b1=0.0, clip_norm=None)))
    state = transform.init(params)
    updates, _ = transform.update(against, state, params, learning_rate=jnp.float32(0.5), **extra)
    g, r = flat(against), flat(reference)
    np.testing.assert_allclose(flat(updates), -0.5 * (g - r * (g @ r) / (r @ r)), rtol=1e-3, atol=1e-5)
    assert method.loss(params, {}, memory, key) == {}
    first = method.update_args(params, {}, batch, key)
    plain, _ = transform.update(against, state, params, learning_rate=jnp.float32(0.5), **first)
    np.testing.assert_allclose(flat(plain), -0.5 * g, rtol=1e-5)


def test_agem_needs_a_memory_batch_in_every_step() -> None:
    assert AgemOptions().replay.mode == "mix"
    with pytest.raises(ValueError, match="mode"):
        AgemOptions.model_validate({"replay": {"mode": "interleave"}})


# OSFT


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_leading_directions_are_those_of_the_singular_values(order: tuple[int, int]) -> None:
    weights = jnp.asarray(np.stack([MATRIX, 2.0 * MATRIX[::-1]]).transpose(0, 1 + order[0], 1 + order[1]))
    side = Sides((1 + order.index(0),), (1 + order.index(1),))
    found = leading_directions(weights, side, 2)
    for number, matrix in enumerate((MATRIX, 2.0 * MATRIX[::-1])):
        # Eigenvectors of the two products, from another routine.
        for side_found, product in ((found.inputs, matrix @ matrix.T), (found.outputs, matrix.T @ matrix)):
            vectors = np.linalg.eigh(product.astype(np.float64))[1][:, -2:]
            mine = np.asarray(side_found[number], np.float64)
            np.testing.assert_allclose(mine @ mine.T, vectors @ vectors.T, atol=1e-4)


def test_an_update_keeps_out_of_the_directions_on_both_sides() -> None:
    """Heads and their width are one side of a projection."""
    side = Sides((0,), (1, 2))
    weights, update = (jnp.asarray(RANDOM.normal(size=(6, 2, 4)), jnp.float32) for _ in range(2))
    found = np.asarray(outside(update, leading_directions(weights, side, 3), side), np.float64).reshape(6, 8)
    u, _, vt = np.linalg.svd(np.asarray(weights, np.float64).reshape(6, 8), full_matrices=False)
    left, right = np.eye(6) - u[:, :3] @ u[:, :3].T, np.eye(8) - vt[:3].T @ vt[:3]
    np.testing.assert_allclose(found, left @ np.asarray(update, np.float64).reshape(6, 8) @ right, atol=1e-5)
    assert np.abs(found).max() > 0.1


def test_a_step_changes_no_leading_direction_of_any_layer() -> None:
    network = tiny_llama()
    params = init(network)
    method = Osft(OsftOptions(share=0.5), network, 2)
    state = method.prepare(params, method.init(params), StandInTask([], index=0))
    config = OptimizerConfig(weight_decay=0.1)
    transform = method.transform(make_parts(config))

    @jax.jit
    def step(params: Any, opt_state: Any, gradient: Any) -> Any:
        extra = method.update_args(params, state, make_batch(), jax.random.key(0))
        updates, opt_state = transform.update(gradient, opt_state, params, learning_rate=jnp.float32(0.1), **extra)
        return optax.apply_updates(params, updates), opt_state

    after, opt_state = params, transform.init(params)
    for seed in range(3):
        after, opt_state = step(after, opt_state, perturbed(params, 1.0, seed))
    kernels = {"up": (8, 12), "query": (8, 8)}
    held = 0
    for name, leaf in named(params).items():
        change = np.asarray(named(after)[name] - leaf, np.float64)
        assert np.abs(change).max() > 1e-3, name
        kind = next((kind for kind in kernels if f"{kind}/kernel" in name), None)
        if kind is None:
            continue
        held += 1
        for layer, moved in zip(np.asarray(leaf, np.float64), change, strict=True):
            inputs = kernels[kind][0]
            u, _, vt = np.linalg.svd(layer.reshape(inputs, -1), full_matrices=False)
            np.testing.assert_allclose(u[:, : inputs // 2].T @ moved.reshape(inputs, -1), 0.0, atol=1e-5)
            np.testing.assert_allclose(moved.reshape(inputs, -1) @ vt[: inputs // 2].T, 0.0, atol=1e-5)
    assert held == len(kernels)


def test_embeddings_and_norms_are_free() -> None:
    network = tiny_llama()
    method = Osft(OsftOptions(), network, 2)
    held = jax.tree_util.tree_flatten_with_path(
        method.init(init(network))["directions"], is_leaf=lambda node: hasattr(node, "inputs")
    )[0]
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in held}
    assert names
    assert all(name.startswith("blocks/") and name.endswith("kernel") for name in names)


def test_a_model_from_scratch_is_free_in_its_first_task() -> None:
    network = tiny_llama()
    params = init(network)
    method = Osft(OsftOptions(general_knowledge=False), network, 2)
    state = method.init(params)
    first = method.prepare(params, state, StandInTask([], index=0))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(first))
    side, update = Sides((0,), (1,)), jnp.asarray(MATRIX)
    zeros = jax.tree.map(jnp.zeros_like, leading_directions(update, side, 2))
    np.testing.assert_array_equal(outside(update, zeros, side), update)
    second = method.prepare(params, state, StandInTask([], index=1))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(second))


def test_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="olora"):
        Osft.check(OsftOptions(), llama_config(lora=LoraConfig(rank=2)))
