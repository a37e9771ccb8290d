"""Attention by modality: the split of a row's divergence, its gradient, and heads rated by block, by brute force."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional import (
    BLOCKS,
    AttentionTeacher,
    AttentionView,
    PartWeights,
    attention_divergence,
    attention_maps,
    block_squares,
    encode_rows,
    select_by_block,
    select_heads,
    selected_rows,
    split_divergence,
    split_slopes,
    watch_blocks,
)
from jaxcl.methods.passes.blocks import whole
from jaxcl.methods.passes.losses import example_losses
from jaxcl.methods.seekr import Seekr, SeekrOptions
from jaxcl.models.images import Images
from jaxcl.models.mask import visible
from jaxcl.models.probe import Probe, Tap
from tests.tiny.batches import StandInTask, make_batch
from tests.tiny.networks import init, llama_config, perturbed, tiny_llama
from tests.tiny.vision import VISION

RNG = np.random.default_rng(0)
BATCH, LENGTH, HEADS, KV, DIM = 2, 9, 4, 2, 3
MODALITY = jnp.array([[0, 0, 1, 1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]])
SEGMENTS = jnp.array([[1] * 9, [1] * 6 + [0] * 3])


def rows(*shape: int, zeros: float = 0.3) -> np.ndarray:
    """Rows of weights, some of them 0."""
    values = RNG.random(shape) * (RNG.random(shape) > zeros) + 1e-9
    return values / values.sum(axis=-1, keepdims=True)


def view(seed: int, causal: bool = True) -> AttentionView:
    rng = np.random.default_rng(seed)
    query, key = (jnp.asarray(rng.normal(size=(BATCH, LENGTH, n, DIM)), jnp.float32) for n in (HEADS, KV))
    return AttentionView(query, key, SEGMENTS, causal, 1.1)


@pytest.mark.parametrize("case", range(5))
def test_the_parts_are_those_of_the_chain_rule_and_sum_to_the_divergence(case: int) -> None:
    p, q = rows(6, 11), rows(6, 11, zeros=0.0)
    modality = RNG.integers(0, 2, 11) if case else np.zeros(11, int)  # once, a modality has no keys
    found = split_divergence(jnp.asarray(p, jnp.float32), jnp.log(jnp.asarray(q, jnp.float32)), jnp.asarray(modality))
    for row in range(6):
        mass, within = 0.0, []
        for number in (0, 1):
            own = modality == number
            one, other = p[row, own].sum(), q[row, own].sum()
            mass += one * np.log(one / other) if one > 0 else 0.0
            inner = (p[row, own] / one, q[row, own] / other) if one > 0 else (np.ones(0), np.ones(0))
            within.append(one * np.sum(inner[0] * np.log(inner[0] / inner[1])))
        np.testing.assert_allclose(found.mass[row], mass, atol=1e-6)
        np.testing.assert_allclose(found.within[row], within, atol=1e-6)
        whole = np.sum(p[row] * np.log(p[row] / q[row]))
        np.testing.assert_allclose(found.mass[row] + found.within[row].sum(), whole, atol=1e-6)
        np.testing.assert_allclose(found.weighted(PartWeights())[row], whole, atol=1e-6)


def test_weights_that_are_zero_need_no_logarithms() -> None:
    p = jnp.array([0.5, 0.0, 0.5, 0.0])
    logs = jnp.array([jnp.log(0.25), -jnp.inf, jnp.log(0.75), -jnp.inf])
    found = split_divergence(p, logs, jnp.array([0, 0, 0, 1]))
    np.testing.assert_allclose(found.mass, 0.0, atol=1e-7)
    np.testing.assert_allclose(found.within, [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0.0], atol=1e-6)


@pytest.mark.parametrize("parts", [PartWeights(), PartWeights(0.0, 1.0, 0.0), PartWeights(0.5, 2.0, 3.0)])
def test_slopes_are_the_gradient_in_the_scores(parts: PartWeights) -> None:
    p, scores = jnp.asarray(rows(5, 8), jnp.float32), jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)
    modality = jnp.asarray(RNG.integers(0, 2, 8))

    def loss(scores: jax.Array) -> jax.Array:
        return jnp.sum(split_divergence(p, jax.nn.log_softmax(scores, axis=-1), modality).weighted(parts))

    found = split_slopes(p, jax.nn.softmax(scores, axis=-1), modality, parts)
    np.testing.assert_allclose(found, jax.grad(loss)(scores), atol=1e-5)


def teacher(coded: bool = False) -> AttentionTeacher:
    heads = jnp.array([[0, 3, -1], [2, -1, 1]])
    queries = jnp.array([[1, 4, 6, 8], [0, 3, 5, -1]])
    exact = selected_rows(view(1), heads, queries)
    return AttentionTeacher(encode_rows(exact) if coded else exact, heads, queries)


def by_hand(query: jax.Array, key: jax.Array, stored: AttentionTeacher, parts: PartWeights) -> jax.Array:
    """Each example's mean over its pairs, from whole attention maps."""
    maps = attention_maps(view(0)._replace(query=query, key=key))
    means = []
    for row in range(BATCH):
        found = []
        for place, head in enumerate(stored.heads[row].tolist()):
            for number, at in enumerate(stored.queries[row].tolist()):
                if head >= 0 and at >= 0:
                    own = jnp.log(jnp.maximum(maps[row, head, at], 1e-30))
                    found.append(split_divergence(stored.rows[row, place, number], own, MODALITY[row]).weighted(parts))
        means.append(jnp.mean(jnp.stack(found)))
    return jnp.stack(means)


@pytest.mark.parametrize("parts", [PartWeights(1.0, 1.0, 1.0), PartWeights(0.0, 0.5, 4.0)])
def test_weighted_attention_distillation_and_its_gradient_equal_those_of_whole_maps(parts: PartWeights) -> None:
    own, stored = view(0), teacher()

    def ours(query: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.sum(attention_divergence(own._replace(query=query, key=key), stored, MODALITY, parts)[0])

    def theirs(query: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.sum(by_hand(query, key, stored, parts))

    found = jax.jit(jax.value_and_grad(ours, (0, 1)))(own.query, own.key)
    expected = jax.value_and_grad(theirs, (0, 1))(own.query, own.key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_without_weights_nothing_is_split_and_with_ones_nothing_changes() -> None:
    own = view(0)

    def program(*given: Any) -> str:
        def run(query: jax.Array) -> jax.Array:
            return attention_divergence(own._replace(query=query), teacher(), *given)[0]

        return jax.jit(run).lower(own.query).as_text()

    assert program() == program(None, PartWeights()) == program(MODALITY, None) != program(MODALITY, PartWeights())
    plain, split = (attention_divergence(own, teacher(), *given)[0] for given in ((), (MODALITY, PartWeights())))
    np.testing.assert_allclose(plain, split, rtol=1e-5)
    coded = attention_divergence(own, teacher(coded=True), MODALITY, PartWeights())[0]
    np.testing.assert_allclose(coded, plain, rtol=0.05)


def test_padding_and_the_modality_of_padding_change_nothing() -> None:
    own, parts = view(0), PartWeights(0.5, 2.0, 3.0)
    base = attention_divergence(own, teacher(), MODALITY, parts)[0]
    other = MODALITY.at[1, 6:].set(1)
    np.testing.assert_array_equal(attention_divergence(own, teacher(), other, parts)[0], base)
    moved = own._replace(key=own.key.at[1, 6:].add(3.0))
    np.testing.assert_allclose(attention_divergence(moved, teacher(), MODALITY, parts)[0], base, rtol=1e-6)


def test_squares_and_their_gradient_by_block() -> None:
    squares = jnp.asarray(RNG.random((BATCH, HEADS, LENGTH, LENGTH)), jnp.float32)
    found = np.asarray(block_squares(squares, MODALITY))
    expected = np.zeros((len(BLOCKS), HEADS))
    for row, head, query, key in itertools.product(*map(range, squares.shape)):
        block = BLOCKS.index("_".join(("text", "image")[int(MODALITY[row, one])] for one in (query, key)))
        expected[block, head] += float(squares[row, head, query, key])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # The gradient of the dummy holds the squares of the cotangent where it counts.
    seen = jnp.asarray(RNG.random((BATCH, 1, LENGTH, LENGTH)) > 0.5)
    slopes = jnp.sqrt(squares)

    def loss(dummy: jax.Array) -> jax.Array:
        return jnp.sum(slopes * watch_blocks(jnp.zeros_like(squares), seen, MODALITY, dummy))

    watched = jax.grad(loss)(jnp.zeros((len(BLOCKS), HEADS)))
    np.testing.assert_allclose(watched, block_squares(jnp.where(seen, squares, 0.0), MODALITY), rtol=1e-5)


def test_heads_are_chosen_block_by_block() -> None:
    importance = np.asarray(RNG.random((3, 5, 4)), np.float32)
    budgets, layers, per_layer = (3, 2, 1), 3, 2
    chosen: set[tuple[int, int]] = set()
    for rating, budget in zip(importance, budgets, strict=True):
        best = sorted(range(5), key=lambda layer: -rating[layer].sum())[:layers]
        order = sorted(itertools.product(best, range(4)), key=lambda one: -rating[one])
        before = len(chosen)
        for layer, head in order:
            full = sum(one[0] == layer for one in chosen) >= per_layer
            if (layer, head) not in chosen and not full and len(chosen) < before + budget:
                chosen.add((layer, head))
    found = [tuple(one) for one in select_by_block(jnp.asarray(importance), layers, budgets, per_layer).tolist()]
    assert len(set(found)) == sum(budgets)
    assert found == sorted(found)
    assert set(found) == chosen


def test_one_block_is_the_selection_without_blocks() -> None:
    importance = jnp.asarray(RNG.random((6, 4)), jnp.float32)
    np.testing.assert_array_equal(select_by_block(importance[None], 3, (7,), 3), select_heads(importance, 3, 7, 3))


# ---------------------------------------------------------------- the method

SEEING = tiny_llama(vision=VISION | {"image_size": 4, "patch_size": 2})
OPTIONS = {
    "attention_weight": 100.0,
    "layer_budget": 2,
    "head_budget": 4,
    "query_budget": 0,
    "store_logits": 0,
    "store_attention": "float32",
    "distil_heads": "rows",
    "logit_weight": 0.5,
}


def shown_batch() -> Any:
    index = jnp.full((2, 7), -1).at[:, 1:5].set(jnp.arange(4))
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 4, 4, 3)), jnp.float32)
    return dataclasses.replace(make_batch((7, 6)), images=Images(pixels, index))


def taught(images: bool, **changes: Any) -> tuple[Any, Any, Any]:
    """Loss, its terms and gradient of a step on remembered rows, whose teacher is another network."""
    method = Seekr(SeekrOptions(**OPTIONS | changes), SEEING, 2)
    batch = shown_batch() if images else make_batch((7, 6))
    params = init(SEEING)
    state = method.init(params) | {"heads": jnp.array([[[0, 1], [0, 3], [1, 0], [1, 2]]] * 2)}
    teacher = jax.jit(method.signals)(perturbed(params, 0.3), state, batch, jax.random.key(1))
    batch = dataclasses.replace(batch, teacher=teacher, origin="memory")

    def loss(params: Any) -> Any:
        terms = method.loss(params, state, batch, jax.random.key(2))
        return sum(term.weight * term.sum / term.count for term in terms.values()), terms

    (value, terms), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, terms["attention"], slopes


def test_weights_of_one_are_the_method_without_the_split_to_the_bit() -> None:
    plain, ones = taught(True), taught(True, modality_weights=(1, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, plain, ones)
    other = taught(True, modality_weights=(1, 1, 2))
    assert float(other[1].sum) > float(plain[1].sum)


def test_the_parts_of_the_attention_term_sum_to_it() -> None:
    whole = float(taught(True)[1].sum)
    parts = [float(taught(True, modality_weights=one)[1].sum) for one in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(whole, rel=1e-5)


def test_weights_of_modalities_change_nothing_for_text() -> None:
    plain, weighted = taught(False), taught(False, modality_weights=(5, 6, 7))
    jax.tree.map(np.testing.assert_array_equal, plain, weighted)


BUDGETS = {"modality_budgets": (2, 1, 1, 1), "layer_budget": 2, "head_budget": 128}  # the last is not used


def test_heads_are_rated_by_block() -> None:
    method, plain = (Seekr(SeekrOptions(**OPTIONS | one), SEEING, 2) for one in (BUDGETS, {}))
    batch, params = shown_batch(), init(SEEING)
    after = perturbed(params, 0.3)
    modality = np.asarray(batch.modality)

    def maps(params: Any, change: Any = None) -> Any:
        tap = None if change is None else Tap(lambda probs, seen, one: probs + one, change)
        return SEEING.hidden(params, batch, tap=tap, probe=Probe(lambda view, _: attention_maps(view)))

    # Sensitivity: the gradient in the attention weights themselves, added to by zeros.
    zeros = jnp.zeros((2, 2, 4, 7, 7))

    def loss(change: jax.Array) -> jax.Array:
        return jnp.sum(example_losses(SEEING, params, maps(params, change).states, batch, 0))

    squares = jnp.square(jax.jit(jax.grad(loss))(zeros))
    moved = jnp.square(jax.jit(lambda p: maps(p).probed)(after) - jax.jit(lambda p: maps(p).probed)(params))
    seen = np.asarray(visible(batch.segments, True, None))[:, 0]
    found = jax.jit(method.add_sensitivity)(method.no_sums(), params, batch)
    changed = jax.jit(method.add_forgettability)(method.no_sums(), params, after, batch)
    for block, (query, key) in enumerate(itertools.product((0, 1), repeat=2)):
        pairs = (modality == query)[:, :, None] & (modality == key)[:, None, :] & seen
        for sums, values in ((found, squares), (changed, moved)):
            expected = np.sum(np.asarray(values) * pairs[None, :, None], axis=(1, 3, 4))
            np.testing.assert_allclose(sums.total[block], expected, rtol=1e-3, atol=1e-8)
            assert float(np.ravel(sums.triples[block])[0]) == pairs.sum()
    np.testing.assert_allclose(
        whole(found).mean(), plain.add_sensitivity(plain.no_sums(), params, batch).mean(), rtol=1e-4
    )
    state = jax.jit(method.select)(method.init(params), found, changed, jnp.int32(0))
    normal = found.mean() / jnp.sum(found.mean(), axis=-1, keepdims=True)
    expected = select_by_block(normal * changed.mean(), 2, (2, 1, 1, 1), 4)
    np.testing.assert_array_equal(state["heads"][0], expected)
    np.testing.assert_allclose(state["sensitivity"][0].sum(axis=-1), 1.0, rtol=1e-5)


def test_blocks_that_no_example_has_get_heads_of_all_blocks() -> None:
    method = Seekr(SeekrOptions(**OPTIONS | {"modality_budgets": (0, 0, 0, 3)}), SEEING, 2)
    plain = Seekr(SeekrOptions(**OPTIONS | {"head_budget": 3}), SEEING, 2)
    params = init(SEEING)
    batch = make_batch((7, 6))
    chosen = []
    for one in (method, plain):
        sums = (
            one.add_sensitivity(one.no_sums(), params, batch),
            one.add_forgettability(one.no_sums(), params, perturbed(params, 0.3), batch),
        )
        chosen.append(one.select(one.init(params), *sums, jnp.int32(0))["heads"][0])
    np.testing.assert_array_equal(*chosen)


def test_clients_that_measure_alike_choose_the_same_heads() -> None:
    method = Seekr(SeekrOptions(**OPTIONS | BUDGETS), SEEING, 2)
    params, batch = init(SEEING), shown_batch()
    sums = [method.add_sensitivity(method.no_sums(), params, batch)]
    sums.append(method.add_forgettability(method.no_sums(), params, perturbed(params, 0.3), batch))
    state = method.select(method.init(params), *sums, jnp.int32(0))
    assert set(method.share(state)) == {
        f"{block}{name}" for block in ("", "block_") for name in ("sensitivity", "forgettability")
    }
    np.testing.assert_array_equal(method.merge(state, method.share(state))["heads"], state["heads"])


def test_importance_by_block_is_shown_where_heads_are_rated_so() -> None:
    method, plain = (Seekr(SeekrOptions(**OPTIONS | one), SEEING, 2) for one in (BUDGETS, {}))
    params, batch = init(SEEING), shown_batch()
    sums = [method.add_sensitivity(method.no_sums(), params, batch)]
    sums.append(method.add_forgettability(method.no_sums(), params, perturbed(params, 0.3), batch))
    tables = method.tables(method.select(method.init(params), *sums, jnp.int32(0)))
    measures = [tables[f"block_{name}"][0] for name in ("sensitivity", "forgettability")]
    np.testing.assert_allclose(tables["importance_blocks"], measures[0] * measures[1], rtol=1e-6)
    np.testing.assert_allclose(measures[1], sums[1].mean(), rtol=1e-6)
    assert "importance_blocks" not in plain.tables(plain.init(params))


def test_heads_that_look_at_images_are_taught_on_the_new_tasks_images() -> None:
    """With `distil_on: task`, by whole maps: the spread over images, at heads chosen for words on images."""
    options = {"distil_on": "task", "modality_budgets": (0, 3, 0, 0), "modality_weights": (0, 0, 1), "head_budget": 8}
    method, batch, before = Seekr(SeekrOptions(**OPTIONS | options), SEEING, 2), shown_batch(), init(SEEING)
    sums = [method.add_sensitivity(method.no_sums(), before, batch)]
    sums.append(method.add_forgettability(method.no_sums(), before, perturbed(before, 0.2), batch))
    state = method.select(method.init(before), *sums, jnp.int32(0))
    by_block = np.asarray(sums[0].mean() / sums[0].mean().sum(axis=-1, keepdims=True) * sums[1].mean())
    heads = state["heads"][0].tolist()
    assert heads == select_by_block(by_block[1:2], 2, (3,), 4).tolist()

    known = perturbed(before, 0.1)
    state = method.prepare(known, state, StandInTask([batch], index=1))
    student = perturbed(before, 0.3, seed=5)
    term = jax.jit(method.loss)(student, state, batch, jax.random.key(0))["attention"]

    def maps(params: Any) -> np.ndarray:
        return np.asarray(SEEING.hidden(params, batch, probe=Probe(lambda view, _: attention_maps(view))).probed)

    theirs, own = maps(known), maps(student)
    modality, real = np.asarray(batch.modality), np.asarray(batch.segments) > 0
    rows = []
    for row in range(2):
        layers: dict[int, list[float]] = {}
        for (layer, head), at in itertools.product(heads, np.flatnonzero(real[row])):
            there = (modality[row] == 1) & real[row] & (np.arange(7) <= at)
            p, q = theirs[layer, row, head, at, there], own[layer, row, head, at, there]
            divergence = np.sum(p * np.log((p / p.sum()) / (q / q.sum()))) if there.any() else 0.0
            layers.setdefault(layer, []).append(divergence)
        rows.append(np.mean([np.mean(one) for one in layers.values()]))
    assert min(rows) > 0
    np.testing.assert_allclose(term.sum / term.count, np.mean(rows), rtol=1e-3)


@pytest.mark.parametrize(
    ("network", "budgets", "message"),
    [
        (tiny_llama(), (1, 0, 0, 0), "the model does not see"),
        (SEEING, (4, 4, 1, 0), "together 9; allowed are 1 to 8, the heads of 2 layers"),
        (SEEING, (0, 0, 0, 0), "together 0; allowed are 1 to 8"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(network: Any, budgets: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^modality_budgets: {message}"):
        Seekr(SeekrOptions(**OPTIONS | {"modality_budgets": budgets}), network, 2)


def test_values_of_heads_have_no_parts_by_modality() -> None:
    with pytest.raises(ValueError, match="modality_weights: what is weighted are parts of attention rows"):
        Seekr.check(
            SeekrOptions(distil_heads="values", modality_weights=(1, 2, 1), layer_budget=1, head_budget=1),
            llama_config(),
        )
