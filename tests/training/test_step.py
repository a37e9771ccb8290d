from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.errors import UserError
from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import OptimizerParts
from jaxcl.models.batch import Batch
from jaxcl.training.feed import place_batch
from jaxcl.training.micro_batches import micro_batches
from jaxcl.training.trainer import Trainer
from tests.tiny.trainer import TinyMethod, assert_same, host, make_params, make_rows, make_trainer


def step_once(trainer: Trainer, rows: dict[str, Any]) -> Any:
    state = trainer.start_task(trainer.init(make_params()), 10)
    return trainer.step(state, place_batch(rows, trainer.layout.batch))


def reference_loss(params: Any, rows: dict[str, Any]) -> dict[str, float]:
    """The terms of `TinyMethod` over the whole batch, in float64, by loops."""
    embedding, kernel, bias = (
        np.asarray(leaf, np.float64)
        for leaf in (params["embed"]["embedding"], params["head"]["kernel"], params["head"]["bias"])
    )
    lm, size, rows_seen = 0.0, 0.0, 0
    for tokens, targets, weights in zip(rows["tokens"], rows["targets"], rows["weights"], strict=True):
        for token, target, weight in zip(tokens, targets, weights, strict=True):
            scores = embedding[token] @ kernel + bias
            lm += weight * (np.log(np.exp(scores).sum()) - scores[target])
        if weights.any():
            rows_seen += 1
            size += float(np.square(embedding[tokens]).sum())
    terms = {"term/lm": lm / rows["weights"].sum(), "term/size": size / rows_seen}
    return {"loss": terms["term/lm"] + 0.01 * terms["term/size"], **terms}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_loss_and_gradient_are_those_of_the_formula(accumulate: int) -> None:
    rows = make_rows(3, uneven=True)
    rate = 1e-3
    options = {"name": "sgd", "b1": 0, "clip_norm": None, "schedule": "constant", "warmup": 0, "learning_rate": rate}
    state, metrics = step_once(make_trainer(accumulate=accumulate, **options), rows)
    params = host(make_params())
    for name, value in reference_loss(params, rows).items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    # Plain gradient descent shows the gradient, (before - after) / rate; central differences say what it should be.
    places = [
        ("head", "kernel", (2, 3)),
        ("head", "bias", (5,)),
        ("embed", "embedding", (int(rows["tokens"][0, 0]), 1)),
    ]
    for outer, inner, place in places:
        values = []
        for sign in (1, -1):
            moved = jax.tree.map(lambda leaf: np.array(leaf, np.float64), params)
            moved[outer][inner][place] += sign * 1e-5
            values.append(reference_loss(moved, rows)["loss"])
        expected = (values[0] - values[1]) / 2e-5
        got = (params[outer][inner][place] - np.asarray(state.params[outer][inner])[place]) / rate
        assert got == pytest.approx(expected, rel=2e-3, abs=2e-3), (outer, inner)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_remembered_rows_beside_a_batch_add_their_own_loss(accumulate: int) -> None:
    """Each term is a mean over its own rows, whatever the other batch counts, and the gradient is the sum of both."""
    rows, remembered = make_rows(3, uneven=True), make_rows(5, origin="memory", uneven=True)
    assert rows["weights"].sum() != remembered["weights"].sum()
    options = {"name": "sgd", "b1": 0, "clip_norm": None, "schedule": "constant", "warmup": 0, "learning_rate": 1e-2}
    state, metrics = step_once(make_trainer(accumulate=accumulate, **options), {**rows, "memory": remembered})
    params = host(make_params())
    task, memory = reference_loss(params, rows), reference_loss(params, remembered)
    assert float(metrics["loss"]) == pytest.approx(task["loss"] + memory["loss"], rel=1e-5)
    for name in ("lm", "size"):
        assert float(metrics[f"term/{name}"]) == pytest.approx(task[f"term/{name}"], rel=1e-5)
        assert float(metrics[f"term/memory_{name}"]) == pytest.approx(memory[f"term/{name}"], rel=1e-5)
    assert float(metrics["tokens"]) == (rows["segments"] > 0).sum() + (remembered["segments"] > 0).sum()
    apart = [host(step_once(make_trainer(**options), part)[0].params) for part in (rows, remembered)]
    moved = jax.tree.map(lambda start, *ends: sum(end - start for end in ends), params, *apart)
    for found, start, expected in zip(*map(jax.tree.leaves, (host(state.params), params, moved)), strict=True):
        np.testing.assert_allclose(found - start, expected, atol=2e-6)


def test_accumulation_changes_no_number() -> None:
    rows = make_rows(5, batch=12, uneven=True)
    weights = rows["weights"].reshape(3, 4, -1).sum((0, 2))
    assert len(set(weights)) > 1, "the micro-batches must be uneven for this test to mean anything"
    whole, whole_metrics = step_once(make_trainer(name="sgd", warmup=0, learning_rate=0.01), rows)
    parts, parts_metrics = step_once(make_trainer(name="sgd", warmup=0, learning_rate=0.01, accumulate=4), rows)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), host(whole.params), host(parts.params)
    )
    for name, value in whole_metrics.items():
        assert float(parts_metrics[name]) == pytest.approx(float(value), rel=2e-6), name


def test_the_count_pass_holds_no_second_forward_pass() -> None:
    """Matrix products in the compiled step: as many with accumulation as without."""
    products = {}
    for accumulate in (1, 4):
        trainer = make_trainer(accumulate=accumulate)
        batch = place_batch(make_rows(0), trainer.layout.batch)
        text = trainer.jitted_step.lower(trainer.target, batch, trainer.key).compile().as_text()
        products[accumulate] = len(re.findall(r" dot\(|custom-call\(", text))
    assert products[1] == products[4] > 2


def test_micro_batches_take_every_row_once() -> None:
    trainer = make_trainer()
    parts = micro_batches(place_batch(make_rows(0, batch=6), trainer.layout.batch), 3)
    assert parts.tokens.shape[:2] == (3, 2)
    assert sorted(np.asarray(parts.example).ravel()) == list(range(6))
    with pytest.raises(ValueError, match="accumulate=4"):
        micro_batches(place_batch(make_rows(0, batch=6), trainer.layout.batch), 4)


def test_a_term_that_counts_nothing_adds_nothing() -> None:
    class Empty(TinyMethod):
        def loss(self, params: Any, state: Any, batch: Batch, key: Any) -> Terms:
            terms = dict(super().loss(params, state, batch, key))
            scale = jnp.sum(params["head"]["kernel"])
            return {**terms, "nothing": Term(0.0 * scale, jnp.float32(0), 5.0)}

    rows = make_rows(1)
    plain, plain_metrics = step_once(make_trainer(), rows)
    other, metrics = step_once(make_trainer(Empty()), rows)
    assert float(metrics["term/nothing"]) == 0
    assert float(metrics["loss"]) == float(plain_metrics["loss"])
    assert_same(plain.params, other.params)


def test_metrics_are_norms_rate_and_tokens() -> None:
    rows = make_rows(2, uneven=True)
    state, metrics = step_once(make_trainer(warmup=0, learning_rate=0.25, clip_norm=0.01), rows)
    before, after = host(make_params()), host(state.params)
    moved = jax.tree.map(lambda a, b: b - a, before, after)

    def norm(tree: Any) -> float:
        return float(np.sqrt(sum(np.square(leaf.astype(np.float64)).sum() for leaf in jax.tree.leaves(tree))))

    assert float(metrics["param_norm"]) == pytest.approx(norm(after), rel=1e-5)
    assert float(metrics["update_norm"]) == pytest.approx(norm(moved), rel=1e-3)
    assert float(metrics["grad_norm"]) > 0.1, "the norm is that before clipping"
    assert float(metrics["learning_rate"]) == 0.25
    assert float(metrics["tokens"]) == (rows["segments"] > 0).sum()


def test_the_state_is_donated() -> None:
    trainer = make_trainer()
    state = trainer.start_task(trainer.init(make_params()), 10)
    new, _ = trainer.step(state, place_batch(make_rows(0), trainer.layout.batch))
    jax.block_until_ready(new)
    old = jax.tree.leaves((state.params, state.opt_state, state.method_state))
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_one_compilation_serves_all_tasks_and_one_more_each_kind() -> None:
    method = TinyMethod()
    trainer = make_trainer(method)
    method.traces = 0
    state = trainer.init(make_params())
    for total in (3, 5):
        state = trainer.start_task(state, total)
        for index in range(total):
            kind = "memory" if index % 2 else "task"
            state, _ = trainer.step(state, place_batch(make_rows(index, origin=kind), trainer.layout.batch))
    assert trainer.jitted_step._cache_size() == 2
    assert method.traces == 2
    assert int(state.step) == 8
    assert int(state.clock.step) == 5


def test_each_step_gets_a_key_of_its_own_and_the_same_again() -> None:
    class Draws(TinyMethod):
        def loss(self, params: Any, state: Any, batch: Batch, key: Any) -> Terms:
            terms = dict(super().loss(params, state, batch, key))
            return {**terms, "draw": Term(jax.random.uniform(key), jnp.float32(1), 0.0)}

    draws: list[list[float]] = []
    for _ in range(2):
        trainer = make_trainer(Draws())
        state = trainer.start_task(trainer.init(make_params()), 3)
        draws.append([])
        for _ in range(3):
            state, metrics = trainer.step(state, place_batch(make_rows(0), trainer.layout.batch))
            draws[-1].append(float(metrics["term/draw"]))
    assert draws[0] == draws[1]
    assert len(set(draws[0])) == 3


def test_a_methods_mask_reaches_its_place_in_the_optimizer() -> None:
    import optax

    class Frozen(TinyMethod):
        def transform(self, parts: OptimizerParts) -> Any:
            def update(updates: Any, state: Any, params: Any = None, *, mask: Any, **_: Any) -> Any:
                return jax.tree.map(lambda leaf, factor: leaf * factor, updates, mask), state

            hide = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
            return optax.chain(parts.clip, parts.precondition, hide, parts.weight_decay, parts.learning_rate)

        def update_args(self, params: Any, state: Any, batch: Any, key: Any) -> dict[str, Any]:
            ones = jax.tree.map(jnp.ones_like, params)
            return {"mask": {**ones, "embed": jax.tree.map(jnp.zeros_like, ones["embed"])}}

    state, _ = step_once(make_trainer(Frozen(), warmup=0), make_rows(0))
    assert_same(state.params["embed"], make_params()["embed"])
    assert not np.array_equal(state.params["head"]["kernel"], make_params()["head"]["kernel"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_update_sees_the_whole_batch(accumulate: int) -> None:
    import optax

    class Counting(TinyMethod):
        def transform(self, parts: OptimizerParts) -> Any:
            def update(updates: Any, state: Any, params: Any = None, *, count: Any, **_: Any) -> Any:
                return jax.tree.map(lambda leaf: jnp.full_like(leaf, count), updates), state

            return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

        def update_args(self, params: Any, state: Any, batch: Any, key: Any) -> dict[str, Any]:
            return {"count": jnp.sum(batch.weights)}

    rows = make_rows(0)
    state, _ = step_once(make_trainer(Counting(), accumulate=accumulate), rows)
    moved = host(state.params)["head"]["bias"] - make_params()["head"]["bias"]
    np.testing.assert_allclose(moved, rows["weights"].sum(), rtol=1e-6)


class PathIntegral(TinyMethod):
    """What synaptic intelligence gathers (Zenke et al., 2017, equation 3): minus the sum of gradient times step."""

    def init(self, params: Any) -> Any:
        return {"gathered": jax.tree.map(jnp.zeros_like, params), "steps": jnp.int32(0)}

    def track(self, params: Any, state: Any, before: Any, gradient: Any, means: Any) -> Any:
        part = jax.tree.map(lambda new, old, slope: slope * (new - old), params, before, gradient)
        return {"gathered": jax.tree.map(jnp.subtract, state["gathered"], part), "steps": state["steps"] + 1}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_method_gathers_along_the_way(accumulate: int) -> None:
    method = PathIntegral()
    trainer = make_trainer(method, accumulate=accumulate, warmup=0)
    state = trainer.start_task(trainer.init(make_params()), 5)
    expected: Any = jax.tree.map(jnp.zeros_like, make_params())
    for index in range(3):
        batch = place_batch(make_rows(index), trainer.layout.batch)

        def loss(params: Any, batch: Any = batch) -> Any:
            terms = method.loss(params, {}, batch, jax.random.key(0))
            return sum(term.weight * term.sum / term.count for term in terms.values())

        before = jax.tree.map(jnp.copy, state.params)
        gradient = jax.grad(loss)(before)
        state, _ = trainer.step(state, batch)
        moved = jax.tree.map(jnp.subtract, state.params, before)
        expected = jax.tree.map(lambda total, slope, step: total - slope * step, expected, gradient, moved)
    assert int(state.method_state["steps"]) == 3
    gathered = state.method_state["gathered"]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-7), gathered, expected)
    assert sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(gathered)) > 0  # the loss fell


def test_what_track_returns_keeps_its_shape() -> None:
    class Growing(PathIntegral):
        def track(self, params: Any, state: Any, before: Any, gradient: Any, means: Any) -> Any:
            return {**state, "steps": jnp.zeros(2, jnp.int32)}

    with pytest.raises(
        ValueError, match=r"method state steps: expected int32\[\], got int32\[2\]; Method.init decides"
    ):
        step_once(make_trainer(Growing()), make_rows(0))


def test_a_method_that_changes_its_state_in_place_changes_nothing() -> None:
    class Careless(PathIntegral):
        def loss(self, params: Any, state: Any, batch: Any, key: Any) -> Any:
            state["steps"] += 100
            return super().loss(params, state, batch, key)

    state, _ = step_once(make_trainer(Careless(), accumulate=2), make_rows(0))
    assert int(state.method_state["steps"]) == 1


@pytest.mark.parametrize(
    ("result", "got"), [(Term(jnp.float32(1), jnp.float32(1)), "a Term"), ({"loss": 1.0}, "a float at 'loss'")]
)
def test_a_loss_that_is_no_mapping_of_terms_is_named(result: Any, got: str) -> None:
    class Wrong(TinyMethod):
        def loss(self, params: Any, state: Any, batch: Any, key: Any) -> Any:
            return result

    with pytest.raises(UserError, match=rf"Wrong.loss: expected a mapping from names to Term\(.*\), got {got}"):
        step_once(make_trainer(Wrong()), make_rows(0))


@pytest.mark.parametrize("reset", [True, False])
def test_moments_and_schedule_at_the_start_of_a_task(reset: bool) -> None:
    trainer = make_trainer(reset_optimizer=reset)
    state = trainer.start_task(trainer.init(make_params()), 5)
    for index in range(3):
        state, _ = trainer.step(state, place_batch(make_rows(index), trainer.layout.batch))
    moments = host(state.opt_state)
    state = trainer.start_task(state, 7)
    assert [int(value) for value in state.clock[:3]] == [0, 2, 7]
    assert int(state.step) == 3
    if reset:
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(host(state.opt_state)))
    else:
        assert_same(moments, state.opt_state)


def test_params_in_bfloat16_keep_their_type_and_float32_moments() -> None:
    from jaxcl.sharding.layout import Layout
    from jaxcl.sharding.mesh import MeshConfig, make_mesh
    from jaxcl.training.optimizer import OptimizerConfig
    from tests.tiny.trainer import AXES, SHAPES

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), SHAPES)
    layout = Layout.create(make_mesh(MeshConfig(), jax.devices()[:1]), AXES, shapes)
    trainer = Trainer(TinyMethod(), OptimizerConfig(warmup=0, learning_rate=0.5), layout, accumulate=2, seed=0)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_params())
    state = trainer.start_task(trainer.init(params), 4)
    for index in range(2):
        state, metrics = trainer.step(state, place_batch(make_rows(index), layout.batch))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    floats = [leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert set(floats) == {jnp.dtype(jnp.float32)}
    assert np.isfinite(float(metrics["loss"]))


def test_a_changed_method_state_is_put_in_place_or_refused() -> None:
    trainer = make_trainer()
    state = trainer.init(make_params())
    new = {"snapshot": make_params(7), "seen": np.ones(3, np.float32)}
    assert_same(trainer.with_method_state(state, new).method_state, new)
    with pytest.raises(ValueError, match=r"seen: expected float32\[3\], got float32\[4\]"):
        trainer.with_method_state(state, {**new, "seen": jnp.ones(4)})
    with pytest.raises(ValueError, match="structure"):
        trainer.with_method_state(state, {"seen": jnp.ones(3)})


def test_moments_may_wait_on_the_host_and_change_nothing() -> None:
    rows, options = make_rows(3), {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1}
    states = []
    for offload in (False, True):
        trainer = make_trainer(offload=offload, **options)
        state = trainer.start_task(trainer.init(make_params()), 10)
        for _ in range(3):
            state, _ = trainer.step(state, place_batch(rows, trainer.layout.batch))
        states.append(state)
    assert_same(*states)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(states[1].opt_state) if leaf.ndim}
    assert kinds == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(states[1].params)} == {"device"}


class Drawing(TinyMethod):
    """Reports what it draws: in the loss as a term without a gradient, in the update as the whole update."""

    def loss(self, params: Any, state: Any, batch: Batch, key: Any) -> Terms:
        return {"drawn": Term(jax.random.uniform(key) + 0.0 * params["head"]["bias"].sum(), jnp.float32(1))}

    def transform(self, parts: Any) -> Any:
        def update(gradient: Any, state: Any, params: Any = None, *, drawn: Any, **_: Any) -> Any:
            return jax.tree.map(lambda leaf: jnp.full_like(leaf, drawn), gradient), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    def update_args(self, params: Any, state: Any, batch: Batch, key: Any) -> dict[str, Any]:
        return {"drawn": jax.random.uniform(key)}


def draws(accumulate: int, steps: int = 2) -> tuple[list[float], list[float]]:
    """What the loss and the update of each step draw, over two tasks; of the loss the mean of its micro-batches."""
    trainer = make_trainer(Drawing(), accumulate=accumulate)
    state, losses, updates = trainer.init(make_params()), [], []
    for _ in range(2):
        state = trainer.start_task(state, steps)
        for _ in range(steps):
            before = float(state.params["head"]["bias"][0])
            state, metrics = trainer.step(state, place_batch(make_rows(0), trainer.layout.batch))
            losses.append(float(metrics["term/drawn"]))
            updates.append(float(state.params["head"]["bias"][0]) - before)
    return losses, updates


def test_steps_of_two_tasks_draw_different_noise() -> None:
    losses, updates = draws(1)
    assert len({round(value, 5) for value in losses}) == len({round(value, 5) for value in updates}) == 4


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_and_the_update_draw_from_keys_of_their_own(accumulate: int) -> None:
    seen: list[float] = []

    class Telling(Drawing):
        def loss(self, params: Any, state: Any, batch: Batch, key: Any) -> Terms:
            jax.debug.callback(lambda value: seen.append(round(float(value), 5)), jax.random.uniform(key))
            return super().loss(params, state, batch, key)

    trainer = make_trainer(Telling(), accumulate=accumulate)
    state = trainer.start_task(trainer.init(make_params()), 3)
    before = float(state.params["head"]["bias"][0])
    state, _ = trainer.step(state, place_batch(make_rows(0), trainer.layout.batch))
    update = float(state.params["head"]["bias"][0]) - before
    jax.effects_barrier()
    assert len(set(seen)) == accumulate
    assert min(abs(update - value) for value in set(seen)) > 1e-4
