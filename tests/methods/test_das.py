"""The second version of DAS: what it measures, by brute force, and what it keeps from task to task."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional.row_column import RowColumn
from jaxcl.methods.das import Das, DasOptions
from jaxcl.models.network import Network
from tests.tiny.batches import StandInTask, make_batch, pad_batch, take_rows
from tests.tiny.networks import init, named, perturbed, tiny_llama, tiny_roberta


@pytest.fixture(scope="module", params=["llama", pytest.param("roberta", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest) -> Network:
    return tiny_llama(num_layers=1) if request.param == "llama" else tiny_roberta(num_layers=1)


def assert_close(one: Any, other: Any, rtol: float = 1e-3) -> None:
    def close(path: Any, a: Any, b: Any) -> None:
        size = float(np.max(np.abs(b), initial=0))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-4 * size + 1e-12, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, one, other)


def scored_logs(network: Network, params: Any, batch: Any) -> Any:
    """Log-probabilities of all tokens at the scored positions, `[rows, predict, vocab]`."""
    states = network.hidden(params, batch).states
    logs = jax.nn.log_softmax(network.logits(params, states))
    return jnp.take_along_axis(logs, batch.predict[..., None], axis=1)


def test_drawn_targets_give_the_fisher_information_of_every_position(network: Network) -> None:
    """Against the sum over positions and *all* tokens y of p(y) (d log p(y))^2, from every gradient there is."""
    params, batch = perturbed(init(network), 0.3), make_batch((6, 4, 0))
    slopes = jax.jit(jax.jacrev(lambda params: scored_logs(network, params, batch)))(params)
    weights = np.exp(scored_logs(network, params, batch)) * np.asarray(batch.weights)[..., None]
    want = jax.tree.map(lambda leaf: np.tensordot(weights, np.square(leaf), 3), slopes)

    method = Das(DasOptions(resolution="full"), network, 1)

    @jax.jit
    def total(keys: Any) -> Any:
        def add(sums: Any, key: Any) -> Any:
            return method.add_drawn(sums, params, batch, key), None

        return jax.lax.scan(add, method.no_sums(), keys)[0]

    draws = 8000
    sums = total(jax.random.split(jax.random.key(0), draws))
    assert sums.tokens == draws * np.sum(batch.weights) > 0
    for name, leaf in named(sums.total.inputs).items():
        expected = named(want)[name]
        # A square of a normal number has a deviation of root 2, and tails are heavy: a few percent after 8000 draws.
        np.testing.assert_allclose(np.sum(leaf) / draws, np.sum(expected), rtol=0.1, atol=1e-9, err_msg=name)
        top = np.unravel_index(np.argmax(expected), expected.shape)
        if expected[top] > 1e-6:
            np.testing.assert_allclose(leaf[top] / draws, expected[top], rtol=0.3, err_msg=name)


def test_true_targets_give_squares_of_single_examples_by_token(network: Network) -> None:
    params, batch = init(network), make_batch((6, 4, 0, 5))
    slope = jax.jit(
        jax.grad(
            lambda params, row: (
                -jnp.sum(
                    jnp.take_along_axis(scored_logs(network, params, row), row.targets[..., None], -1)[..., 0]
                    * row.weights
                )
            )
        )
    )
    full = None
    for row in (0, 1, 3):
        squares = jax.tree.map(lambda leaf: np.square(np.asarray(leaf)), slope(params, take_rows(batch, [row])))
        full = squares if full is None else jax.tree.map(np.add, full, squares)
    method = Das(DasOptions(targets="true"), network, 1)
    found = jax.jit(method.add_true)(method.no_sums(), params, batch, jax.random.key(0))
    assert_close(found.total, RowColumn.of(full, method.sides()))
    assert found.tokens == np.sum(batch.weights)
    padded = pad_batch(batch, rows=1, length=2, predict=1)
    assert_close(jax.jit(method.add_true)(method.no_sums(), params, padded, jax.random.key(0)).total, found.total)


def test_padding_adds_nothing_to_drawn_squares(network: Network) -> None:
    """The same rows draw the same tokens, whatever fills the batch."""
    params, batch = init(network), make_batch((6, 4))
    method = Das(DasOptions(), network, 1)
    add = jax.jit(method.add_drawn)
    none = add(method.no_sums(), params, make_batch((0, 0)), jax.random.key(0))
    assert none.tokens == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(none.total))
    one = add(method.no_sums(), params, batch, jax.random.key(0))
    other = add(method.no_sums(), params, pad_batch(batch, rows=1, length=2, predict=1), jax.random.key(0))
    assert_close(other.total, one.total)


def test_state_over_two_domains() -> None:
    network = tiny_llama(num_layers=1)
    method = Das(DasOptions(importance_examples=7, decay=0.5), network, 2)
    first, second = init(network), perturbed(init(network), 0.1)
    start = method.init(first)
    tasks = [StandInTask([make_batch(seed=seed), make_batch(seed=5 + seed)], index=seed) for seed in (0, 1)]

    add, needs = jax.jit(method.add_drawn), jax.jit(method.needs)

    def measured(params: Any, task: Any) -> RowColumn:
        sums = method.no_sums()
        for batch in task.examples(7):
            sums = add(sums, params, batch, task.key)
        return sums.total.scaled(1 / sums.tokens)

    prepared = method.prepare(first, start, tasks[0])
    general = measured(first, tasks[0])
    assert_close(prepared["importance"], general)
    learned = method.consolidate(second, prepared, tasks[0])
    domain = measured(second, tasks[0])
    both = jax.tree.map(lambda a, b: 0.5 * a + b, general, domain)
    assert_close(learned["importance"], both)
    # The anchor is where the domain at hand began, not where its importance was measured.
    jax.tree.map(np.testing.assert_array_equal, learned["anchor"], first)
    later = method.prepare(second, learned, tasks[1])
    jax.tree.map(np.testing.assert_array_equal, later["anchor"], second)
    jax.tree.map(np.testing.assert_array_equal, later["importance"], learned["importance"])
    for place, one in enumerate((general, domain)):
        assert_close({kind: table[place] for kind, table in later["history"].items()}, needs(one))
    for state in (prepared, learned, later):
        assert jax.tree.structure(state) == jax.tree.structure(start)
        jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), state, start)
    tables = jax.jit(method.tables)(later)
    assert tables["domains_heads"].shape == (3, 1, 4)
    assert 0 < float(jnp.min(tables["importance_output"])) < float(jnp.max(tables["importance_output"])) < 1
    assert not np.any(later["history"]["heads"][2])


def test_general_knowledge_can_be_left_out() -> None:
    network = tiny_llama(num_layers=1)
    method = Das(DasOptions(general_knowledge=False), network, 1)
    params = init(network)
    state = method.prepare(params, method.init(params), StandInTask([make_batch()]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state["importance"]))


def test_what_is_kept_is_a_choice() -> None:
    """No anchor without a pull; half of one in bfloat16; importance in full; controls."""
    network = tiny_llama(num_layers=1)
    params, task = init(network), StandInTask([make_batch()])

    def known(**options: Any) -> Any:
        method = Das(DasOptions(**options), network, 1)
        return method, method.prepare(params, method.init(params), task)

    method, plain = known()
    shapes = jax.tree.map(jnp.shape, params)
    assert sum(leaf.size for leaf in jax.tree.leaves(plain["importance"])) < 0.5 * network.num_params
    masked = known(hold="mask")
    assert masked[1]["anchor"] == {}
    assert set(jax.eval_shape(masked[0].update_args, params, masked[1], make_batch(), task.key)) == {"masks"}
    half = known(anchor_dtype="bfloat16")[1]["anchor"]
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    full = known(resolution="full")[1]["importance"]
    assert jax.tree.map(jnp.shape, full.inputs) == shapes
    # The same draws: rows and columns are the sums of the squares in full.
    assert_close(RowColumn.of(full.inputs, method.sides()), plain["importance"])

    def stiffness_of(method: Das) -> Any:
        return jax.jit(method.update_args)(params, plain, make_batch(), task.key)["stiffness"]

    stiffness = jax.jit(lambda: plain["importance"].evened(method.options.evenness, params, method.sides()))()
    assert_close(stiffness_of(method), jax.tree.map(lambda leaf: method.options.strength * leaf, stiffness))
    even = stiffness_of(Das(DasOptions(evenness=1.0, strength=3.0), network, 1))
    mean = 3.0 * plain["importance"].mean(params)
    assert_close(even, jax.tree.map(lambda leaf: np.full(leaf.shape, mean), params))
    for selection in ("permuted", "layer"):
        control = known(selection=selection)[1]["importance"]
        kernel = control.inputs["blocks"]["mlp"]["up"]["kernel"]
        assert not np.allclose(kernel, plain["importance"].inputs["blocks"]["mlp"]["up"]["kernel"])


def test_only_adapters_are_held_where_only_they_are_trained() -> None:
    network = tiny_llama(num_layers=1, lora={"rank": 2, "alpha": 3.0, "targets": ["query", "out", "up"]})
    params = perturbed(init(network), 0.1)
    method = Das(DasOptions(hold="both"), network, 1)
    state = method.prepare(params, method.init(params), StandInTask([make_batch()]))
    names = {path.rpartition("/")[2] for path in named(state["anchor"])}
    assert names == {"lora_a", "lora_b"}
    assert set(named(state["importance"].inputs)) == set(named(state["anchor"]))
    up = state["importance"].inputs["blocks"]["mlp"]["up"]
    assert {name: leaf.shape for name, leaf in up.items()} == {"lora_a": (1, 8, 1), "lora_b": (1, 2, 1)}
    assert all(np.any(leaf > 0) for leaf in jax.tree.leaves(state["importance"]))
    args = jax.eval_shape(method.update_args, params, state, make_batch(), jax.random.key(0))
    assert set(named(args["masks"])) == set(named(args["stiffness"])) == set(named(state["anchor"]))
