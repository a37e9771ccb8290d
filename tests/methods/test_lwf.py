from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.methods.lwf import Lwf, LwfOptions
from jaxcl.methods.passes.losses import language_model_terms
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network
from tests.tiny.batches import StandInTask, make_batch, pad_batch
from tests.tiny.networks import init, log_softmax, named, perturbed, tiny_llama, tiny_roberta


@pytest.fixture(scope="module", params=["llama", pytest.param("roberta", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest) -> Network:
    return tiny_llama(num_layers=1) if request.param == "llama" else tiny_roberta(num_layers=1)


def prepared(method: Lwf, teacher: Any, index: int = 1) -> Any:
    return method.prepare(teacher, method.init(teacher), StandInTask([], index=index))


def softened(network: Network, params: Any, batch: Batch, temperature: float) -> np.ndarray:
    """Log-probabilities at the scored positions, `[batch, predict, vocab]`, float64."""
    scores = np.asarray(network.logits(params, network.hidden(params, batch).states))
    assert batch.predict is not None
    return log_softmax(np.take_along_axis(scores, np.asarray(batch.predict)[..., None], 1) / temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_terms_are_the_formula(network: Network, temperature: float) -> None:
    params, teacher, batch = init(network), perturbed(init(network), 0.2), make_batch((6, 4, 0))
    method = Lwf(LwfOptions(temperature=temperature, weight=0.5), network, 2)
    terms = jax.jit(method.loss)(params, prepared(method, teacher), batch, jax.random.key(0))
    old, new = (softened(network, one, batch, temperature) for one in (teacher, params))
    divergence = np.sum(np.exp(old) * (old - new), axis=-1)
    np.testing.assert_allclose(terms["distillation"].sum, np.sum(divergence * batch.weights), rtol=1e-4)
    assert terms["distillation"].count == terms["loss"].count == np.sum(batch.weights)
    assert terms["distillation"].weight == 0.5
    plain = language_model_terms(network, params, batch, jax.random.key(0), 0)["loss"]
    np.testing.assert_allclose(terms["loss"].sum, plain.sum, rtol=1e-5)


def test_its_gradient_is_that_of_the_papers_cross_entropy(network: Network) -> None:
    params, teacher, batch = init(network), perturbed(init(network), 0.2), make_batch()
    method = Lwf(LwfOptions(), network, 2)
    old = np.exp(softened(network, teacher, batch, 2.0))

    def cross_entropy(params: Any) -> Any:
        scores = network.logits(params, network.hidden(params, batch).states)
        scores = jax.numpy.take_along_axis(scores, batch.predict[..., None], 1) / 2.0  # type: ignore[index]
        return -jax.numpy.sum(old * jax.nn.log_softmax(scores) * batch.weights[..., None])

    def distillation(params: Any) -> Any:
        return method.loss(params, prepared(method, teacher), batch, jax.random.key(0))["distillation"].sum

    expected, found = (named(jax.jit(jax.grad(function))(params)) for function in (cross_entropy, distillation))
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-3, atol=1e-5, err_msg=name)
    assert max(float(abs(leaf).max()) for leaf in expected.values()) > 0.01


def test_the_first_task_is_plain_training_and_runs_no_teacher(network: Network) -> None:
    # A teacher of other params would be seen in the loss, one of NaN in the gradient as well.
    params, batch, key = init(network), make_batch(), jax.random.key(0)
    method = Lwf(LwfOptions(), network, 2)
    state = prepared(method, jax.tree.map(lambda leaf: leaf * np.nan, params), index=0)

    def total(params: Any) -> tuple[Any, Any]:
        terms = method.loss(params, state, batch, key)
        return sum(term.weight * term.sum for term in terms.values()), terms

    (value, terms), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert terms["distillation"].sum == terms["distillation"].count == 0
    plain = jax.jit(jax.value_and_grad(lambda params: language_model_terms(network, params, batch, key, 0)["loss"].sum))
    expected = plain(params)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected[1])


def test_a_model_agrees_with_itself(network: Network) -> None:
    params, method = init(network), Lwf(LwfOptions(), network, 2)
    terms = jax.jit(method.loss)(params, prepared(method, params), make_batch(), jax.random.key(0))
    np.testing.assert_allclose(terms["distillation"].sum, 0.0, atol=1e-5)


def test_padding_and_chunks_change_nothing(network: Network) -> None:
    params, batch, key = init(network), make_batch((6, 4, 5)), jax.random.key(0)
    whole, parts = (Lwf(LwfOptions(loss_chunk=chunk), network, 2) for chunk in (0, 1))
    state = prepared(whole, perturbed(params, 0.2))
    expected = jax.jit(whole.loss)(params, state, batch, key)
    padded = jax.jit(parts.loss)(params, state, pad_batch(batch, rows=1, length=2, predict=1), key)
    for name, term in expected.items():
        np.testing.assert_allclose(padded[name].sum, term.sum, rtol=1e-4)
        assert padded[name].count == term.count


def test_scores_of_all_positions_never_exist_at_once() -> None:
    network, length = tiny_llama(num_layers=1, vocab_size=97), 16
    method = Lwf(LwfOptions(loss_chunk=4), network, 2)
    params = network.shapes()
    batch = make_batch((16, 16), length=length, predict=length)
    gradient = jax.grad(
        lambda params, state: sum(term.sum for term in method.loss(params, state, batch, jax.random.key(0)).values())
    )
    program = str(jax.make_jaxpr(gradient)(params, jax.eval_shape(method.init, params)))
    assert "f32[2,4,97]" in program
    assert "f32[2,16,97]" not in program
    assert "f32[4,2,4,97]" not in program


def test_shapes_of_the_state_never_change(network: Network) -> None:
    params, method = init(network), Lwf(LwfOptions(), network, 2)
    start, later = method.init(params), prepared(method, perturbed(params, 0.1))
    assert jax.tree.structure(start) == jax.tree.structure(later)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), start, later)


@pytest.mark.parametrize("learned", [0, 1])
def test_a_gate_is_on_the_own_loss_and_not_on_the_divergence(learned: int) -> None:
    network, batch = tiny_llama(), make_batch()
    params = init(network)

    def terms(gate: Any) -> Any:
        method = Lwf(LwfOptions(loss_gate=gate), network, 2)
        state = prepared(method, perturbed(params, 0.1), index=learned)
        return jax.jit(lambda: method.loss(params, state, batch, jax.random.key(0)))()

    plain, gated = terms("none"), terms("probability")
    expected = language_model_terms(network, params, batch, jax.random.key(0), 0, "probability")["loss"]
    np.testing.assert_allclose(gated["loss"].sum, expected.sum, rtol=1e-5)
    assert float(gated["loss"].sum) < 0.99 * float(plain["loss"].sum)
    np.testing.assert_allclose(gated["distillation"].sum, plain["distillation"].sum, rtol=1e-6)


def test_the_start_may_teach_all_tasks(network: Network) -> None:
    params, later, batch = init(network), perturbed(init(network), 0.1), make_batch()
    method = Lwf(LwfOptions(teacher="start", temperature=1.0), network, 2)
    state = prepared(method, params, index=0)
    divergence = method.loss(later, state, batch, jax.random.key(0))["distillation"]
    teacher, student = (softened(network, one, batch, 1.0) for one in (params, later))
    by_token = (np.exp(teacher) * (teacher - student)).sum(-1)
    np.testing.assert_allclose(divergence.sum, (by_token * np.asarray(batch.weights)).sum(), rtol=1e-4)
    assert float(divergence.count) > 0
    second = method.prepare(later, state, StandInTask([], index=1))
    assert jax.tree.all(jax.tree.map(np.array_equal, second, state))
