import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.methods.derpp import Derpp, DerppOptions
from jaxcl.methods.options import ReplayConfig
from jaxcl.methods.passes.losses import language_model_terms
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network
from tests.tiny.batches import make_batch
from tests.tiny.networks import VOCAB, init, perturbed, tiny_llama, tiny_roberta
from tests.tiny.stored import collated, stored_records


@pytest.fixture(scope="module", params=["llama", pytest.param("roberta", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest) -> Network:
    return tiny_llama(num_layers=1) if request.param == "llama" else tiny_roberta(num_layers=1)


def through_the_store(method: Derpp, params: Any, batch: Batch, length: int, predict: int | None) -> Batch:
    """The batch as it comes back: stored row by row and put together again."""
    records: list[Any] = list(stored_records(method, params, {}, batch))
    for row, example in enumerate(np.asarray(batch.example)):
        if example < 0:
            records[row] = None
    teacher = collated(method, params, {}, records, length, predict)
    return dataclasses.replace(batch, origin="memory", teacher=teacher)


def outputs(network: Network, params: Any, batch: Batch, match: str) -> np.ndarray:
    states = network.hidden(params, batch).states
    values = np.asarray(states if match == "hidden" else network.logits(params, states), np.float64)
    return values if batch.predict is None else np.take_along_axis(values, np.asarray(batch.predict)[..., None], 1)


@pytest.mark.parametrize("match", ["hidden", "logits"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_terms_are_the_formula(network: Network, match: Any, chunk: int) -> None:
    before, now, batch = init(network), perturbed(init(network), 0.2), make_batch((6, 4, 0))
    method = Derpp(DerppOptions(match=match, alpha=0.3, beta=0.7, loss_chunk=chunk), network, 2)
    memory = through_the_store(method, before, batch, 7, 3)
    assert memory.teacher is not None
    assert memory.teacher["outputs"].shape == (3, 3, 8 if match == "hidden" else VOCAB)
    terms = jax.jit(method.loss)(now, {}, memory, jax.random.key(0))
    squares = (outputs(network, now, batch, match) - outputs(network, before, batch, match)) ** 2
    np.testing.assert_allclose(terms["match"].sum, np.sum(squares.mean(axis=-1) * batch.weights), rtol=1e-4)
    assert terms["match"].count == terms["loss"].count == np.sum(batch.weights)
    plain = language_model_terms(network, now, batch, jax.random.key(0), 0)["loss"]
    np.testing.assert_allclose(terms["loss"].sum, plain.sum, rtol=1e-5)
    assert (terms["match"].weight, terms["loss"].weight) == (0.3, 0.7)


@pytest.mark.parametrize("match", ["hidden", "logits"])
def test_a_model_that_did_not_move_matches_itself(network: Network, match: Any) -> None:
    params = init(network)
    method = Derpp(DerppOptions(match=match), network, 2)
    memory = through_the_store(method, params, make_batch(), 7, 3)
    terms = jax.jit(method.loss)(params, {}, memory, jax.random.key(0))
    np.testing.assert_allclose(terms["match"].sum, 0.0, atol=1e-10)


def test_positions_that_are_not_scored_are_not_stored(network: Network) -> None:
    method = Derpp(DerppOptions(), network, 1)
    batch = make_batch((6, 4), predict=3)  # 3 and 2 scored positions
    records = stored_records(method, init(network), {}, batch)
    assert [record["outputs"].shape for record in records] == [(3, 8), (2, 8)]


def test_rows_that_are_scored_everywhere_are_stored_up_to_their_last_target() -> None:
    network = tiny_llama(num_layers=1)
    method = Derpp(DerppOptions(), network, 1)
    weights = jnp.array([[1, 1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], jnp.float32)
    batch = make_batch((6, 4))
    batch = dataclasses.replace(batch, predict=None, weights=weights, targets=batch.tokens)
    before, now = init(network), perturbed(init(network), 0.2)
    memory = through_the_store(method, before, batch, 7, None)
    assert memory.teacher is not None
    assert memory.teacher["outputs"].shape == (2, 7, 8)
    assert [int(np.any(row, axis=1).sum()) for row in np.asarray(memory.teacher["outputs"])] == [4, 1]
    squares = (outputs(network, now, batch, "hidden") - outputs(network, before, batch, "hidden")) ** 2
    terms = jax.jit(method.loss)(now, {}, memory, jax.random.key(0))
    np.testing.assert_allclose(terms["match"].sum, np.sum(squares.mean(axis=-1) * weights), rtol=1e-4)


def test_rows_of_the_task_have_the_plain_loss(network: Network) -> None:
    params, batch, key = init(network), make_batch(), jax.random.key(0)
    terms = jax.jit(Derpp(DerppOptions(), network, 1).loss)(params, {}, batch, key)
    assert list(terms) == ["loss"]
    assert terms["loss"].weight == 1.0


def test_what_cannot_work_is_said() -> None:
    network = tiny_llama(num_layers=1)
    with pytest.raises(ValueError, match="keeps nothing"):
        Derpp.check(DerppOptions(replay=ReplayConfig(fraction=0, minimum=0)), network.config)
    with pytest.raises(UserError, match="nothing is stored"):
        Derpp(DerppOptions(), network, 1).loss(init(network), {}, make_batch(origin="memory"), jax.random.key(0))
