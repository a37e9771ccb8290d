from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional.importance import ImportanceSums, normalise
from jaxcl.methods.das_paper import DasPaper, DasPaperOptions
from jaxcl.methods.passes.importance import add_domain_importance, add_general_importance
from jaxcl.models.gates import Gates
from jaxcl.models.network import Network
from tests.tiny.batches import StandInTask, make_batch, pad_batch
from tests.tiny.networks import filled, init, perturbed, tiny_llama, tiny_roberta


@pytest.fixture(scope="module", params=["llama", pytest.param("roberta", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest) -> Network:
    return tiny_llama(num_layers=1) if request.param == "llama" else tiny_roberta(num_layers=1)


def assert_close(one: Any, other: Any, rtol: float = 1e-4) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5), one, other)


def test_importance_over_two_domains(network: Network) -> None:
    method = DasPaper(DasPaperOptions(proxy_dropout=0.2, importance_examples=7), network, 2)
    params = init(network)
    start = method.init(params)
    batches = [make_batch(), make_batch(seed=1)]
    first = StandInTask(batches, index=0)

    @jax.jit
    def general(key: jax.Array) -> Gates:
        sums = ImportanceSums.zero(network.gates())
        for batch in batches:
            sums = add_general_importance(network, sums, params, batch, key, 0.2, 0)
        return normalise(sums.mean(), "tanh", 0.5)

    prepared = method.prepare(params, start, first)
    known = general(first.key)
    assert_close(prepared["importance"], known, rtol=1e-3)
    assert float(jnp.max(known.heads)) > 0.1

    later = perturbed(params, 0.1)

    @jax.jit
    def domain() -> Gates:
        sums = ImportanceSums.zero(network.gates())
        for batch in batches:
            sums = add_domain_importance(network, sums, later, batch, 0)
        return normalise(sums.mean(), "tanh", 0.5)

    learned = method.consolidate(later, prepared, first)
    assert_close(learned["importance"], jax.tree.map(np.maximum, known, domain()), rtol=1e-3)
    for place, expected in ((0, known), (1, domain()), (2, filled(network, 0.0))):
        assert_close(jax.tree.map(lambda leaf, place=place: leaf[place], learned["history"]), expected, rtol=1e-3)

    assert first.limits == [7, 7]
    # Only the first domain measures general knowledge; structure and shapes of the state never change.
    assert method.prepare(later, learned, StandInTask(batches, index=1)) is learned
    for state in (prepared, learned):
        assert jax.tree.structure(state) == jax.tree.structure(start)
        jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), state, start)
    tables = method.tables(learned)
    np.testing.assert_array_equal(tables["importance_output"], learned["importance"].output)
    assert tables["domains_intermediate"].shape == (3, 1, 12)


def test_normalisation_is_a_choice(network: Network) -> None:
    params = init(network)
    batches = [make_batch()]
    method = DasPaper(DasPaperOptions(normalisation="quantile", protected_share=0.25), network, 1)
    state = method.consolidate(params, method.init(params), StandInTask(batches))
    np.testing.assert_allclose((np.asarray(state["importance"].output) > 0).mean(), 0.25)


def test_contrast_equals_separate_passes(network: Network) -> None:
    # Without any noise the positive equals the anchor, and the passes can be run one by one.
    batch = make_batch((6, 4, 0))
    params = init(network)
    importance = jax.tree.map(
        lambda leaf: 0.2 + 0.6 * (jnp.arange(leaf.size) % 2).reshape(leaf.shape), filled(network, 1)
    )

    def pooled(gates: Gates | None) -> np.ndarray:
        states = np.asarray(jax.jit(lambda gates: network.hidden(params, batch, gates=gates).states)(gates), np.float64)
        mean = [states[row, :count].mean(axis=0) for row, count in enumerate((6, 4))]
        return np.stack([one / np.linalg.norm(one) for one in mean])

    full, past = pooled(None), pooled(importance)
    scores = np.exp(np.concatenate([full @ full.T, full @ past.T], axis=1) / 0.1)
    expected = -np.log(np.diagonal(scores) / scores.sum(axis=1)).sum()
    for anchor in ("own", "language_model"):
        options = DasPaperOptions(proxy_dropout=0.0, temperature=0.1, contrast_weight=0.5, anchor=anchor)
        method = DasPaper(options, network, 1)
        state = {**method.init(params), "importance": importance}
        terms = jax.jit(method.loss)(params, state, batch, jax.random.key(0))
        assert sorted(terms) == ["contrast", "loss"]
        np.testing.assert_allclose(terms["contrast"].sum, expected, rtol=1e-4)
        assert terms["contrast"].count == 2
        assert terms["contrast"].weight == 0.5

    padded = jax.jit(method.loss)(params, state, pad_batch(batch, rows=1, length=2, predict=1), jax.random.key(0))
    for name, term in terms.items():
        np.testing.assert_allclose(padded[name].sum, term.sum, rtol=1e-4)
        assert padded[name].count == term.count


@pytest.mark.slow
def test_fixed_negatives_leave_only_the_slope_through_the_full_network() -> None:
    """Against finite differences of a contrast in NumPy whose past is held, or moves along."""
    network = tiny_roberta(num_layers=1)
    batch, params = make_batch((6, 4)), init(network)
    importance = jax.tree.map(
        lambda leaf: 0.2 + 0.6 * (jnp.arange(leaf.size) % 2).reshape(leaf.shape), filled(network, 1)
    )
    # Gradients of the whole tree are compared along one direction, in which the past moves as much as the rest.
    direction = jax.tree.map(lambda one, other: one - other, perturbed(params, 1.0), params)
    states = jax.jit(lambda params, gates: network.hidden(params, batch, gates=gates).states)

    def pooled(step: float, gates: Gates | None) -> np.ndarray:
        moved = jax.tree.map(lambda leaf, along: leaf + step * along, params, direction)
        found = np.asarray(states(moved, gates), np.float64)
        mean = np.stack([found[row, :count].mean(axis=0) for row, count in enumerate((6, 4))])
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def total(step: float, past_step: float) -> float:
        full, past = pooled(step, None), pooled(past_step, importance)
        scores = np.exp(np.concatenate([full @ full.T, full @ past.T], axis=1))
        return float(-np.log(np.diagonal(scores) / scores.sum(axis=1)).sum())

    small = 2e-3
    slopes = {
        "trained": (total(small, small) - total(-small, -small)) / (2 * small),
        "fixed": (total(small, 0.0) - total(-small, 0.0)) / (2 * small),
    }
    assert abs(slopes["trained"] - slopes["fixed"]) > 0.1 * abs(slopes["trained"])
    values = set()
    for negatives, slope in slopes.items():
        method = DasPaper(DasPaperOptions(proxy_dropout=0.0, temperature=1.0, negatives=negatives), network, 1)
        state = {**method.init(params), "importance": importance}

        def contrast(params: Any, method: DasPaper = method, state: Any = state) -> jax.Array:
            return method.loss(params, state, batch, jax.random.key(0))["contrast"].sum

        value, gradient = jax.jit(jax.value_and_grad(contrast))(params)
        along = jax.tree.map(lambda one, other: float(jnp.vdot(one, other)), gradient, direction)
        np.testing.assert_allclose(sum(jax.tree.leaves(along)), slope, rtol=1e-2)
        values.add(float(value))
    # What is differentiated changes no value.
    np.testing.assert_allclose(max(values), min(values), rtol=1e-6)


@pytest.mark.slow
def test_proxy_is_a_choice() -> None:
    network = tiny_llama(num_layers=1)
    params, batches = init(network), [make_batch()]
    found = []
    for proxy in ("outputs", "pooled"):
        method = DasPaper(DasPaperOptions(proxy=proxy), network, 1)
        task = StandInTask(batches)
        found.append(method.prepare(params, method.init(params), task)["importance"])
        sums = add_general_importance(
            network, ImportanceSums.zero(network.gates()), params, batches[0], task.key, 0.1, 0, proxy
        )
        assert_close(found[-1], normalise(sums.mean(), "tanh", 0.5), rtol=1e-3)
    assert not np.allclose(found[0].output, found[1].output, rtol=1e-2)


def test_passes_of_the_contrast_draw_noise_of_their_own() -> None:
    network = tiny_llama(num_layers=1)
    params, batch = init(network), make_batch()
    sums: dict[float, set[float]] = {}
    for rate in (0.0, 0.3):
        method = DasPaper(DasPaperOptions(proxy_dropout=rate), network, 1)
        loss = jax.jit(method.loss)
        state = {**method.init(params), "importance": filled(network, 0.5)}
        terms = [loss(params, state, batch, jax.random.key(seed)) for seed in (0, 1)]
        sums[rate] = {float(one["contrast"].sum) for one in terms}
        # The decoder's own loss stays free of noise.
        assert len({float(one["loss"].sum) for one in terms}) == 1
    assert len(sums[0.0]) == 1
    assert len(sums[0.3]) == 2


def test_a_model_with_dropout_keeps_its_own() -> None:
    assert DasPaper(DasPaperOptions(), tiny_llama(), 1)._noise_rate() == 0.1
    assert DasPaper(DasPaperOptions(), tiny_llama(dropout=0.2), 1)._noise_rate() is None
    assert DasPaper(DasPaperOptions(), tiny_roberta(attention_dropout=0.2), 1)._noise_rate() is None


def scans(program: Any) -> int:
    """Scans of a program, those within a condition included."""
    total = 0
    for equation in program.eqns:
        branches = equation.params["branches"] if equation.primitive.name == "cond" else ()
        total += (equation.primitive.name == "scan") + sum(scans(branch.jaxpr) for branch in branches)
    return total


def test_each_variant_runs_its_passes_and_no_other() -> None:
    """A pass over the layers is a scan; one more for each that is differentiated."""
    network = tiny_llama(num_layers=1)
    params, batch = network.shapes(), make_batch()
    variants: dict[tuple[Any, ...], DasPaperOptions] = {
        (1, 1): DasPaperOptions(contrast_weight=0),
        (4, 4): DasPaperOptions(anchor="own", negatives="trained"),
        (4, 3): DasPaperOptions(anchor="own", negatives="fixed"),
        (3, 3): DasPaperOptions(anchor="language_model", negatives="trained"),
        (3, 2): DasPaperOptions(anchor="language_model", negatives="fixed"),
    }
    for (forward, backward), options in variants.items():
        method = DasPaper(options, network, 1)
        state = jax.eval_shape(method.init, params)

        def loss(params: Any, state: Any, method: DasPaper = method) -> jax.Array:
            return sum(term.sum for term in method.loss(params, state, batch, jax.random.key(0)).values())

        found = []
        for function in (loss, jax.grad(loss)):
            program = jax.make_jaxpr(function)(params, state)
            found.append(scans(program.jaxpr))
        assert found == [forward, forward + backward], options


def test_options_are_held_against_the_model() -> None:
    with pytest.raises(ValueError, match="proxy_dropout"):
        DasPaper.check(DasPaperOptions(proxy_dropout=0.0), tiny_llama().config)
    DasPaper.check(DasPaperOptions(proxy_dropout=0.0), tiny_roberta(hidden_dropout=0.1).config)
    DasPaper.check(
        DasPaperOptions(proxy_dropout=0.0, general_knowledge=False, contrast_weight=0.0), tiny_llama().config
    )
    DasPaper.check(DasPaperOptions(), tiny_llama().config)


@pytest.mark.slow
def test_there_is_no_contrast_before_anything_is_known() -> None:
    network = tiny_llama(num_layers=1)
    params, batch = init(network), make_batch()
    method = DasPaper(DasPaperOptions(general_knowledge=False), network, 2)
    empty = method.init(params)

    def term(params: Any, state: Any) -> Any:
        return method.loss(params, state, batch, jax.random.key(0))["contrast"]

    assert [float(value) for value in jax.jit(term)(params, empty)] == [0, 0, 1]
    slope = jax.jit(jax.grad(lambda params: term(params, empty).sum))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))
    known = jax.jit(term)(params, method.consolidate(params, empty, StandInTask([batch])))
    assert float(known.sum) > 0
    assert float(known.count) == 3


@pytest.mark.slow
def test_the_past_has_dropout_of_its_own() -> None:
    """With every gate open, the past is one more pass of the whole network: it draws other noise than the positive."""
    network = tiny_roberta(num_layers=1, hidden_dropout=0.3)
    params, batch = init(network), make_batch((6, 6))
    method = DasPaper(DasPaperOptions(temperature=1.0), network, 1)
    state = {**method.init(params), "importance": network.gates()}
    seen: list[jax.Array] = []
    pooled = method._pooled

    def record(*args: Any) -> jax.Array:
        seen.append(pooled(*args))
        return seen[-1]

    method._pooled = record  # type: ignore[method-assign]
    with jax.disable_jit():
        method.loss(params, state, batch, jax.random.key(0))
    positive, past = seen
    assert float(jnp.abs(positive - past).max()) > 1e-3
