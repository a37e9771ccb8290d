"""What leaves a client of federated training, and what it makes of what all clients know."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional.federated import combine_shared
from jaxcl.functional.fisher import FisherSums
from jaxcl.functional.row_column import RowColumn
from jaxcl.methods import METHODS, find_method
from jaxcl.methods.das import Das, DasOptions, Sums
from jaxcl.methods.das_paper import DasPaper, DasPaperOptions
from jaxcl.methods.ewc import Ewc, EwcOptions
from jaxcl.methods.seekr import Seekr, SeekrOptions
from jaxcl.models.gates import Gates
from jaxcl.models.trainable import trained
from tests.methods.test_registry import MODELS, OPTIONS
from tests.tiny.networks import tiny_llama

SHARED = {
    "das": {"importance"},
    "das_paper": {"importance"},
    "ewc": {"fisher"},
    "seekr": {"sensitivity", "forgettability"},
    "ssu": {"squares"},
}


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def like(tree: Any, seed: int) -> Any:
    """Random numbers of a tree's shapes, at least 0; NumPy draws them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.exponential(size=leaf.shape), jnp.float32), tree)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_leaves_a_client_but_what_is_named_here(name: str) -> None:
    network = tiny_llama(num_layers=1, **MODELS.get(name, {}))
    cls = find_method(name)
    method = cls(cls.Options(**OPTIONS.get(name, {})), network, 3)
    shapes = network.shapes()
    state = jax.eval_shape(method.init, shapes)
    shared = jax.eval_shape(method.share, state)
    assert shared.keys() == SHARED.get(name, set())
    merged = jax.eval_shape(method.merge, state, shared)
    assert jax.tree.structure(merged) == jax.tree.structure(state)
    assert [leaf.shape for leaf in jax.tree.leaves(merged)] == [leaf.shape for leaf in jax.tree.leaves(state)]
    if name not in ("ewc", "das", "ssu"):  # a number per param, or per row or column of a matrix
        numbers = sum(leaf.size for leaf in jax.tree.leaves(shared))
        assert numbers <= 3 * 2 * network.num_heads + 12 + 8


def das(**options: Any) -> Das:
    return Das(DasOptions(general_knowledge=False, **options), tiny_llama(num_layers=1), 2)


def das_state(method: Das, importance: RowColumn) -> Any:
    return {"importance": importance, "anchor": {}, "history": {}}


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_das_knows_after_two_domains_what_one_client_with_all_examples_would(decay: float) -> None:
    """Weighted by their tokens, the means over clients' tokens are those over all tokens."""
    method = das(decay=decay, evenness=0.0)
    assert method.shared_by == "mean"
    zero = RowColumn.zero(trained(method.network.shapes()), method.sides())
    tokens = (3.0, 9.0)

    @jax.jit
    def both_ways(domains: list[list[RowColumn]]) -> tuple[Any, Any]:
        history = method.init(method.network.init(jax.random.key(0)))["history"]
        whole = {"importance": zero, "anchor": {}, "history": history}
        clients = [whole, whole]
        for index, totals in enumerate(domains):
            place = jnp.int32(index + 1)
            clients = [
                method.update_state(state, Sums(total, jnp.float32(count)), place)
                for state, total, count in zip(clients, totals, tokens, strict=True)
            ]
            known = combine_shared([method.share(state) for state in clients], tokens, method.shared_by)
            clients = [method.merge(state, known) for state in clients]
            joined = jax.tree.map(jnp.add, *totals)
            whole = method.update_state(whole, Sums(joined, jnp.float32(sum(tokens))), place)
        return clients, whole

    clients, whole = both_ways([[like(zero, 2 * domain + client) for client in range(2)] for domain in range(2)])
    for client in clients:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), client["importance"], whole["importance"]
        )
    assert bits(clients[0]["history"]) != bits(clients[1]["history"])  # what each domain needs stays at home


def test_das_with_a_maximum_over_domains_takes_it_over_clients_as_well() -> None:
    method = das(accumulate="maximum")
    zero = RowColumn.zero(trained(method.network.shapes()), method.sides())
    states = [das_state(method, like(zero, seed)) for seed in range(2)]
    known = combine_shared([method.share(state) for state in states], [1, 5], method.shared_by)
    merged = method.merge(states[0], known)["importance"]
    assert bits(merged) == bits(jax.tree.map(np.maximum, *(state["importance"] for state in states)))


def test_the_papers_das_takes_the_maximum_over_clients() -> None:
    network = tiny_llama(num_layers=1)
    method = DasPaper(DasPaperOptions(), network, 2)
    states = [{"importance": like(network.gates(), seed), "history": f"of client {seed}"} for seed in range(2)]
    known = combine_shared([method.share(state) for state in states], [1, 5], method.shared_by)
    merged = method.merge(states[1], known)
    assert isinstance(merged["importance"], Gates)
    assert bits(merged["importance"]) == bits(jax.tree.map(np.maximum, *(state["importance"] for state in states)))
    assert merged["history"] == "of client 1"


def test_the_fisher_is_that_of_all_examples() -> None:
    method = Ewc(EwcOptions(), tiny_llama(num_layers=1), 2)
    totals, examples = [{"w": jnp.array([2.0, 8.0])}, {"w": jnp.array([30.0, 0.0])}], (2.0, 6.0)
    means = [FisherSums(total, jnp.float32(count)).mean() for total, count in zip(totals, examples, strict=True)]
    known = combine_shared([method.share({"fisher": mean, "anchor": 0}) for mean in means], examples, method.shared_by)
    assert method.merge({"fisher": means[0], "anchor": "own"}, known) == {"fisher": known["fisher"], "anchor": "own"}
    assert known["fisher"]["w"].tolist() == [32 / 8, 8 / 8]


# SEEKR: one of two layers, two of its four heads.

HERE = [[8.0, 1, 0, 0], [1, 1, 1, 1]]
THERE = [[0.0, 0, 2, 0], [0, 6, 0, 5]]


def seekr(**options: Any) -> Seekr:
    return Seekr(SeekrOptions(layer_budget=1, head_budget=2, **options), tiny_llama(num_layers=2), 3)


def seekr_state(method: Seekr, measured: list[Any]) -> Any:
    """After as many tasks as were measured; sensitivity is 1 everywhere."""
    scores = jnp.zeros((3, 2, 4))
    state: dict[str, Any] = {"sensitivity": scores, "forgettability": scores, "heads": jnp.full((3, 2, 2), -1)}
    for index, forgettability in enumerate(measured):
        state["sensitivity"] = state["sensitivity"].at[index].set(1.0)
        state["forgettability"] = state["forgettability"].at[index].set(jnp.asarray(forgettability))
        importance = state["sensitivity"].sum(0) * state["forgettability"].sum(0)
        layer = int(np.argmax(importance.sum(1)))
        heads = np.sort(np.argsort(-importance[layer], stable=True)[:2])
        state["heads"] = state["heads"].at[index].set(jnp.array([[layer, head] for head in heads]))
    return state


def test_heads_are_selected_from_the_sums_over_clients() -> None:
    """By hand: here layer 0 (9 against 4), there layer 1 (2 against 11); together layer 1, 11 against 15."""
    method = seekr()
    here, there = seekr_state(method, [HERE]), seekr_state(method, [THERE])
    assert here["heads"][0].tolist() == [[0, 0], [0, 1]]
    assert there["heads"][0].tolist() == [[1, 1], [1, 3]]
    known = combine_shared([method.share(here), method.share(there)], [1, 1], method.shared_by)
    merged = jax.jit(method.merge)(here, known)
    assert merged["heads"].tolist() == [[[1, 1], [1, 3]], [[-1, -1]] * 2, [[-1, -1]] * 2]
    np.testing.assert_allclose(merged["forgettability"][0], (np.array(HERE) + np.array(THERE)) / 2)
    # With most of the examples here, layer 0 weighs more.
    known = combine_shared([method.share(here), method.share(there)], [5, 1], method.shared_by)
    assert method.merge(there, known)["heads"][0].tolist() == [[0, 0], [0, 1]]


def test_heads_of_a_task_follow_from_it_and_the_tasks_before_it() -> None:
    method = seekr()
    state = seekr_state(method, [HERE, THERE])
    assert state["heads"][1].tolist() == [[1, 1], [1, 3]]
    merged = jax.jit(method.merge)(state, method.share(state))
    assert bits(merged) == bits(state)


def test_heads_drawn_at_random_stay_and_so_does_what_a_client_stores() -> None:
    method = seekr(importance="random")
    state = {**seekr_state(method, [HERE]), "balance": "own"}
    other = seekr_state(method, [THERE])
    merged = method.merge(state, method.share(other))
    assert merged["heads"].tolist() == state["heads"].tolist()
    assert merged["forgettability"].tolist() == other["forgettability"].tolist()
    assert merged["balance"] == "own"
