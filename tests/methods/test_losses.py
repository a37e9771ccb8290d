import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional.losses import (
    chunked_token_losses,
    cross_entropy,
    over_positions,
    scored_states,
    token_gates,
    token_losses,
)
from jaxcl.functional.terms import Term
from jaxcl.methods.passes.losses import example_losses, language_model_terms
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network
from tests.tiny.batches import make_batch, pad_batch
from tests.tiny.networks import VOCAB, init, log_softmax, tiny_llama, tiny_roberta


def test_token_losses_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (2, 3, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (2, 3))
    expected = -np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_losses(jnp.asarray(logits), jnp.asarray(targets)), expected, rtol=1e-5)


def test_token_losses_survive_large_scores() -> None:
    losses = token_losses(jnp.array([[1e4, 0.0], [-1e4, 0.0]]), jnp.array([0, 0]))
    np.testing.assert_array_equal(losses, [0.0, 1e4])


@pytest.mark.parametrize("vocab", [11, 40])
@pytest.mark.parametrize("gate", ["probability", "entropy"])
def test_gates_scale_loss_and_gradient_of_each_token(gate: Any, vocab: int) -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 2, (2, 3, vocab)), rng.integers(0, vocab, (2, 3))
    logs = log_softmax(logits)
    if gate == "probability":
        expected = np.exp(np.take_along_axis(logs, targets[..., None], -1)[..., 0])
    else:
        top = np.exp(np.sort(logs, axis=-1)[..., ::-1][..., :20])
        top /= top.sum(-1, keepdims=True)
        expected = -(top * np.log(top)).sum(-1) / np.log(20)
    scores, targets = jnp.asarray(logits, jnp.float32), jnp.asarray(targets)
    np.testing.assert_allclose(token_gates(scores, targets, gate), expected, rtol=1e-5)

    def total(scores: jax.Array, gate: Any) -> jax.Array:
        return chunked_token_losses(lambda states: states, scores, targets, 2, gate).sum()

    gated, plain = (jax.grad(total)(scores, one) for one in (gate, "none"))
    np.testing.assert_allclose(gated, expected[..., None] * plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 9, 0])
def test_over_positions_is_the_function_itself(chunk: int) -> None:
    inputs = {"a": jnp.arange(30.0).reshape(2, 5, 3), "b": jnp.arange(10).reshape(2, 5)}
    out = over_positions(lambda x: (x["a"].sum(-1) * x["b"], x["a"]), inputs, chunk)
    np.testing.assert_array_equal(out[0], inputs["a"].sum(-1) * inputs["b"])
    np.testing.assert_array_equal(out[1], inputs["a"])


@pytest.fixture(scope="module", params=["llama", "roberta"])
def network(request: pytest.FixtureRequest) -> Network:
    return tiny_llama() if request.param == "llama" else tiny_roberta()


def terms_of(network: Network, params: Any, batch: Batch, *, chunk: int = 0, seed: int = 0) -> Term:
    key = jax.random.key(seed)
    return jax.jit(lambda key: language_model_terms(network, params, batch, key, chunk)["loss"])(key)


def test_chunks_change_neither_loss_nor_gradient(network: Network) -> None:
    params = init(network)
    rng = np.random.default_rng(1)
    states = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (2, 5)))
    weights = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1.0]])

    def loss(params: Any, states: Any, chunk: int) -> Any:
        return cross_entropy(functools.partial(network.logits, params), states, targets, weights, chunk)

    plain = jax.jit(jax.value_and_grad(lambda *args: loss(*args, chunk=0), (0, 1), has_aux=True))(params, states)
    parts = jax.jit(jax.value_and_grad(lambda *args: loss(*args, chunk=2), (0, 1), has_aux=True))(params, states)
    logits = np.asarray(network.logits(params, states))
    expected = -np.take_along_axis(log_softmax(logits), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(plain[0][0], (expected * np.asarray(weights)).sum(), rtol=1e-5)
    assert plain[0][1] == parts[0][1] == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), plain, parts)


def _arrays(jaxpr: Any) -> Iterator[Any]:
    """Every intermediate result of a program, of the programs within it too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "jaxpr"):
                    inner = inner.jaxpr
                if hasattr(inner, "eqns"):
                    yield from _arrays(inner)


@pytest.mark.parametrize(("chunk", "held"), [(4, False), (0, True)])
def test_chunks_hold_no_scores_of_all_positions(chunk: int, held: bool) -> None:
    network = tiny_llama(vocab_size=64)
    params = network.shapes()
    states = jax.ShapeDtypeStruct((2, 16, 8), jnp.float32)
    targets = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    weights = jax.ShapeDtypeStruct((2, 16), jnp.float32)

    def loss(params: Any, states: Any, targets: Any, weights: Any) -> Any:
        return cross_entropy(functools.partial(network.logits, params), states, targets, weights, chunk)[0]

    program = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(params, states, targets, weights)
    largest = max(int(np.prod(array.shape)) for array in _arrays(program.jaxpr))
    assert (largest >= 2 * 16 * 64) == held
    assert held or largest == 2 * chunk * 64


def test_language_model_terms_score_the_predicted_positions(network: Network) -> None:
    params = init(network)
    batch = make_batch()
    states = jax.jit(network.hidden)(params, batch).states
    logs = log_softmax(np.asarray(network.logits(params, states)))
    expected, per_row = 0.0, []
    for row in range(3):
        losses = [
            -logs[row, batch.predict[row, place], batch.targets[row, place]]
            for place in range(3)
            if batch.weights[row, place]
        ]
        expected += sum(losses)
        per_row.append(np.mean(losses))
    term = terms_of(network, params, batch, chunk=2)
    np.testing.assert_allclose(term.sum, expected, rtol=1e-5)
    assert term.count == 8
    np.testing.assert_allclose(example_losses(network, params, states, batch, 2), per_row, rtol=1e-5)


def test_all_positions_are_scored_without_predict() -> None:
    network = tiny_llama()
    batch = make_batch()
    every = dataclasses.replace(
        batch, predict=None, targets=jnp.roll(batch.tokens, -1, 1), weights=batch.segments.astype(jnp.float32)
    )
    listed = dataclasses.replace(every, predict=jnp.broadcast_to(jnp.arange(7), (3, 7)))
    states = jax.random.normal(jax.random.key(0), (3, 7, 8))
    np.testing.assert_array_equal(scored_states(states, every.predict), scored_states(states, listed.predict))
    params = init(network)
    one, other = (terms_of(network, params, x) for x in (every, listed))
    assert one.count == other.count == 15
    np.testing.assert_allclose(one.sum, other.sum, rtol=1e-6)


def test_padding_changes_no_loss(network: Network) -> None:
    params = init(network)
    batch = make_batch()
    padded = pad_batch(batch, rows=2, length=3, predict=2)
    terms = [terms_of(network, params, x) for x in (batch, padded)]
    assert terms[0].count == terms[1].count
    np.testing.assert_allclose(terms[0].sum, terms[1].sum, rtol=1e-5)
    states = jax.jit(network.hidden)(params, padded).states
    losses = example_losses(network, params, states, padded, 0)
    np.testing.assert_array_equal(losses[3:], 0.0)


def test_dropout_is_drawn_where_the_model_has_it() -> None:
    batch = make_batch()
    for rate, differs in ((0.0, False), (0.5, True)):
        network = tiny_llama(dropout=rate)
        params = init(network)
        terms = jax.jit(
            lambda key, network=network, params=params: language_model_terms(network, params, batch, key, 0)
        )
        sums = {float(terms(jax.random.key(seed))["loss"].sum) for seed in (1, 2)}
        assert (len(sums) == 2) == differs


def test_only_rows_of_the_task_at_hand_are_gated() -> None:
    network = tiny_llama()
    params, batch = init(network), make_batch()

    def terms(origin: Any, gate: Any) -> Term:
        rows = dataclasses.replace(batch, origin=origin)
        return language_model_terms(network, params, rows, jax.random.key(0), 0, gate)["loss"]

    plain = float(terms("task", "none").sum)
    assert float(terms("memory", "probability").sum) == pytest.approx(plain)
    for gate in ("probability", "entropy"):
        assert 0 < float(terms("task", gate).sum) < 0.99 * plain
        assert float(terms("task", gate).count) == float(terms("task", "none").count)
