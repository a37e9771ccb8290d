import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.functional.balance import Balance
from jaxcl.functional.heads import HeadSums
from jaxcl.methods.options import ReplayConfig, ReplayOptions
from jaxcl.methods.passes.heads import add_forgettability, add_sensitivity
from jaxcl.methods.replay import Replay as ReplayMethod
from jaxcl.methods.seekr import Seekr, SeekrOptions
from jaxcl.models.batch import Batch
from jaxcl.models.probe import Tap
from tests.tiny.batches import StandInTask, make_batch, pad_batch, take_rows
from tests.tiny.networks import init, log_softmax, perturbed, tiny_llama, tiny_roberta
from tests.tiny.stored import collated, stored_records

NETWORK = tiny_llama()
EXACT = {
    "attention_weight": 1000.0,
    "layer_budget": 2,
    "head_budget": 3,
    "query_budget": 3,
    "store_logits": 0,
    "store_attention": "float32",
    "distil_heads": "rows",
    "logit_weight": 0.5,
}
BATCH = make_batch((6, 4, 5))
# Task 0 has its three heads in both layers, task 1 in the second only.
HEADS = jnp.array([[[0, 1], [1, 0], [1, 3]], [[1, 0], [1, 1], [1, 2]]])


def make_method(**changes: Any) -> Seekr:
    return Seekr(SeekrOptions(**{**EXACT, **changes}), NETWORK, 2)


@pytest.fixture(scope="module")
def params() -> Any:
    return init(NETWORK)


def state_of(method: Seekr, params: Any) -> Any:
    return {**method.init(params), "heads": HEADS}


def records_of(method: Seekr, params: Any, batch: Batch, key: int = 0) -> list[dict[str, np.ndarray]]:
    return stored_records(method, params, state_of(method, params), batch, key)


def teacher_of(method: Seekr, params: Any, records: Any, length: int = 7, predict: int = 3) -> dict[str, Any]:
    return collated(method, params, state_of(method, params), records, length, predict)


def remembered(batch: Batch, teacher: dict[str, np.ndarray]) -> Batch:
    return dataclasses.replace(batch, origin="memory", teacher=jax.tree.map(jnp.asarray, teacher))


def terms_of(method: Seekr, params: Any, batch: Batch) -> dict[str, tuple[float, float, float]]:
    terms = jax.jit(method.loss)(params, state_of(method, params), batch, jax.random.key(0))
    return {name: (float(term.sum), float(term.count), float(term.weight)) for name, term in terms.items()}


def attention_maps(params: Any, batch: Batch) -> np.ndarray:
    """Explicit maps `[layers, batch, heads, query, key]`, zero where the key is hidden."""

    def maps(params: Any) -> jax.Array:
        kept: list[Any] = []
        x = NETWORK.embed(params, batch)
        for layer in range(NETWORK.num_layers):
            tap = Tap(lambda probs, seen, _: kept.append(probs * seen) or probs)  # type: ignore[func-returns-value]
            layer_params = jax.tree.map(lambda leaf, layer=layer: leaf[layer], NETWORK.blocks(params))
            x, _ = NETWORK.block(layer_params, x, batch, tap=tap)
        return jnp.stack(kept)

    return np.asarray(jax.jit(maps)(params), np.float64)


def output_logs(params: Any, batch: Batch) -> np.ndarray:
    """Log-probabilities at the scored positions."""
    states = jax.jit(NETWORK.hidden)(params, batch).states
    logs = log_softmax(np.asarray(NETWORK.logits(params, states)))
    return np.take_along_axis(logs, np.asarray(batch.predict)[..., None], axis=1)


def test_signals_are_attention_rows_and_outputs(params: Any) -> None:
    batch = dataclasses.replace(BATCH, task=jnp.array([0, 1, 0]))
    maps, logs = attention_maps(params, batch), output_logs(params, batch)
    for row, record in enumerate(records_of(make_method(), params, batch)):
        length, predicted = (6, 4, 5)[row], (3, 2, 3)[row]
        assert record["heads"].tolist() == HEADS[batch.task[row]].tolist()
        queries = record["queries"].tolist()
        assert len(set(queries)) == 3
        assert set(queries) <= set(range(length))
        assert record["rows"].shape == (3, 3, length)
        for (layer, head), rows in zip(record["heads"], record["rows"], strict=True):
            np.testing.assert_allclose(rows, maps[layer, row, head, queries, :length], rtol=1e-4, atol=1e-6)
        assert record["scores"].shape == (predicted, 13)
        np.testing.assert_allclose(record["scores"], logs[row, :predicted], rtol=1e-4, atol=1e-5)


def test_what_is_stored_of_an_example_knows_nothing_of_its_batch(params: Any) -> None:
    batch = dataclasses.replace(BATCH, task=jnp.array([0, 1, 0]))
    records = records_of(make_method(), params, batch)
    method = make_method(loss_chunk=2)
    others = records_of(method, params, take_rows(batch, [2, 1]))
    others += records_of(method, params, pad_batch(batch, rows=2, length=3))[:1]
    for expected, found in zip([records[2], records[1], records[0]], others, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def exact(params: Any) -> tuple[Batch, Any, dict[str, Any]]:
    """Remembered rows of two tasks with an exact teacher, moved params, and the terms worked out by hand."""
    batch = dataclasses.replace(BATCH, task=jnp.array([0, 1, 0]))
    method = make_method()
    records = records_of(method, params, batch)
    teacher = teacher_of(method, params, records)
    after = perturbed(params, 0.1)

    old, new = attention_maps(params, batch), attention_maps(after, batch)
    attention = 0.0
    for row, record in enumerate(records):
        by_layer: dict[int, list[float]] = {}
        for layer, head in record["heads"]:
            for query in record["queries"]:
                p, s = old[layer, row, head, query], new[layer, row, head, query]
                real = p > 0
                by_layer.setdefault(int(layer), []).append(float(np.sum(p[real] * np.log(p[real] / s[real]))))
        attention += float(np.mean([np.mean(values) for values in by_layer.values()]))
    before, now, weights = output_logs(params, batch), output_logs(after, batch), np.asarray(batch.weights)
    logits = float(np.sum((np.exp(before) * (before - now)).sum(-1) * weights))
    targets = np.take_along_axis(now, np.asarray(batch.targets)[..., None], -1)[..., 0]
    expected = {
        "attention": (attention, 3.0, 1000.0),
        "loss": (-float(np.sum(targets * weights)), 8.0, 0.5),
        "logits": (logits, 8.0, 0.5),
    }
    return remembered(batch, teacher), after, expected


def assert_terms(found: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-3) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=rtol, atol=1e-5, err_msg=name)


def test_replay_terms_equal_hand_computed(exact: tuple[Batch, Any, Any]) -> None:
    batch, after, expected = exact
    assert expected["attention"][0] > 1e-3
    assert expected["logits"][0] > 1e-2
    assert_terms(terms_of(make_method(), after, batch), expected)
    assert_terms(terms_of(make_method(loss_chunk=2), after, batch), expected)


def test_the_attention_term_comes_by_layer_too(exact: tuple[Batch, Any, Any]) -> None:
    batch, after, expected = exact
    assert batch.teacher is not None
    means, present = jax.jit(make_method().attention_by_layer)(after, batch)
    # Tasks 0, 1 and 0: task 1 has heads in the second layer only.
    assert present.tolist() == [[True, False, True], [True, True, True]]
    maps = attention_maps(jax.tree.map(np.asarray, after), batch)
    row, (layer, head), places = 2, (0, 1), [at for at in np.asarray(batch.teacher["queries"][2]) if at >= 0]
    p, s = np.asarray(batch.teacher["rows"][row, 0][: len(places)], float), maps[layer, row, head, places]
    by_hand = np.mean(np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-30) / np.maximum(s, 1e-30)), 0), axis=-1))
    np.testing.assert_allclose(means[layer, row], by_hand, rtol=1e-3)
    assert float(means[0, 1]) == 0
    np.testing.assert_allclose(
        np.sum(np.mean(means[:, ::2], axis=0)) + means[1, 1], expected["attention"][0], rtol=1e-3
    )


def test_a_teacher_without_all_it_should_hold_is_an_error(exact: tuple[Batch, Any, Any]) -> None:
    batch, after, _ = exact
    assert batch.teacher is not None
    method, part = make_method(), {name: one for name, one in batch.teacher.items() if name not in ("rows", "scores")}
    with pytest.raises(ValueError, match=r"batch\.teacher: rows, scores missing"):
        terms_of(method, after, dataclasses.replace(batch, teacher=part))
    with pytest.raises(ValueError, match=r"batch\.teacher: expected what `signals` gives, got None"):
        method.attention_by_layer(after, dataclasses.replace(batch, teacher=None))


def test_weights_are_a_and_b(exact: tuple[Batch, Any, Any]) -> None:
    batch, after, _ = exact
    found = terms_of(make_method(logit_weight=0.2, attention_weight=7.0), after, batch)
    assert [round(found[name][2], 6) for name in ("loss", "logits", "attention")] == [0.8, 0.2, 7.0]
    assert sorted(terms_of(make_method(attention_weight=0.0), after, batch)) == ["logits", "loss"]


@pytest.mark.parametrize("heads", ["rows", "values"])
def test_without_an_attention_term_nothing_of_heads_is_stored(params: Any, heads: Any) -> None:
    with_term, without = (
        records_of(make_method(distil_heads=heads, attention_weight=weight), params, BATCH) for weight in (1.0, 0.0)
    )
    for more, less in zip(with_term, without, strict=True):
        assert all(np.all(less[name] == -1) for name in ("heads", "queries"))
        assert sum(less[name].size for name in (heads, "heads", "queries")) < more[heads].size
        np.testing.assert_array_equal(less["scores"], more["scores"])
    after = perturbed(params, 0.1)
    found, expected = (
        terms_of(make_method(attention_weight=0.0, distil_heads=heads), after, batch)
        for batch in (
            dataclasses.replace(
                BATCH, origin="memory", teacher=teacher_of(make_method(distil_heads=heads), params, records)
            )
            for records in (without, with_term)
        )
    )
    assert found == expected


def test_auto_keeps_the_attention_term_in_proportion_to_the_others(exact: tuple[Batch, Any, Any]) -> None:
    batch, after, _ = exact
    method = make_method(logit_weight=0.2, attention_weight="auto", attention_share=3.0, attention_limit=50.0)
    state = method.init(after)
    loss = jax.jit(lambda state: method.loss(after, state, batch, jax.random.key(0)))
    assert float(loss(state)["attention"].weight) == 0
    values = [(2.0, 1.0, 0.5), (4.0, 0.5, 0.1), (3.0, 0.7, 0.3)]
    for prefix, one in zip(("", "memory_", ""), values, strict=True):
        means = {
            f"{prefix}{name}": jnp.float32(x) for name, x in zip(("loss", "logits", "attention"), one, strict=True)
        }
        state = method.track(after, state, after, after, means)
        state = method.track(after, state, after, after, {"loss": jnp.float32(9.0)})  # rows of the task at hand
    weights = [0.1 * 0.9**age for age in (2, 1, 0)]
    rest = sum(w * (0.8 * c + 0.2 * o) for w, (c, o, _) in zip(weights, values, strict=True))
    term = sum(w * a for w, (_, _, a) in zip(weights, values, strict=True))
    assert float(loss(state)["attention"].weight) == pytest.approx(3 * rest / term, rel=1e-5)
    limited = make_method(attention_weight="auto", attention_share=3000.0, attention_limit=50.0)
    assert float(limited.loss(after, state, batch, jax.random.key(0))["attention"].weight) == 50.0


def test_auto_keeps_the_outputs_in_proportion_to_the_cross_entropy(exact: tuple[Batch, Any, Any]) -> None:
    batch, after, _ = exact
    method = make_method(
        logit_weight="auto", logit_share=2.0, logit_limit=30.0, attention_weight="auto", attention_share=0.5
    )
    state = method.init(after)
    values = [(2.0, 1.0, 0.5), (4.0, 0.5, 0.1)]
    rest = 0.0
    for age, one in zip((1, 0), values, strict=True):
        means = {name: jnp.float32(x) for name, x in zip(("loss", "logits", "attention"), one, strict=True)}
        state = method.track(after, state, after, after, means)
        # What outputs weigh is what they weigh from now on.
        seen = values[: 2 - age]
        scale = [0.1 * 0.9**back for back in range(len(seen))][::-1]
        ratio = sum(w * c for w, (c, _, _) in zip(scale, seen, strict=True))
        weight = 2 * ratio / sum(w * o for w, (_, o, _) in zip(scale, seen, strict=True))
        rest = 0.9 * rest + 0.1 * (one[0] + weight * one[1])
    found = method.loss(after, state, batch, jax.random.key(0))
    assert found["loss"].weight == 1.0
    assert float(found["logits"].weight) == pytest.approx(weight, rel=1e-5)
    term = 0.1 * (0.9 * 0.5 + 0.1)
    assert float(found["attention"].weight) == pytest.approx(0.5 * rest / term, rel=1e-5)
    tiny = {"loss": jnp.float32(1.0), "logits": jnp.float32(1e-6), "attention": jnp.float32(1.0)}
    state = method.track(after, method.init(after), after, after, tiny)
    assert float(method.loss(after, state, batch, jax.random.key(0))["logits"].weight) == 30.0


def test_what_says_nothing_changes_no_balance() -> None:
    balance = Balance.zero().add(jnp.float32(0.5), jnp.float32(2.0))
    for term, rest in ((0.0, 1.0), (np.nan, 1.0), (1.0, np.inf)):
        assert balance.add(jnp.float32(term), jnp.float32(rest)) == balance


def test_a_model_has_no_divergence_from_itself(params: Any, exact: tuple[Batch, Any, Any]) -> None:
    found = terms_of(make_method(), params, exact[0])
    np.testing.assert_allclose([found["attention"][0], found["logits"][0]], 0.0, atol=1e-5)


def test_neither_padding_nor_fillers_change_the_terms(params: Any, exact: tuple[Batch, Any, Any]) -> None:
    batch, after, expected = exact
    method = make_method()
    plain = dataclasses.replace(batch, origin="task", teacher=None)
    records = records_of(method, params, plain)
    # Longer rows, more scored positions, a row that only fills the batch.
    teacher = teacher_of(method, params, [*records, None], 9, 4)
    assert teacher["rows"].shape == (4, 3, 3, 9)
    longer = remembered(pad_batch(plain, rows=1, length=2, predict=1), teacher)
    assert_terms(terms_of(method, after, longer), expected)


def test_gradients_reach_what_attention_reads_and_stay_finite(exact: tuple[Batch, Any, Any]) -> None:
    batch, after, _ = exact
    method = make_method()

    def attention(params: Any) -> jax.Array:
        return method.loss(params, state_of(method, params), batch, jax.random.key(0))["attention"].sum

    gradients = jax.jit(jax.grad(attention))(after)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    query = np.asarray(gradients["blocks"]["attention"]["query"]["kernel"])
    touched = np.abs(query).sum(axis=(1, 3)) > 0
    # The last layer's heads are reached if and only if some task selected them; the first layer's through the second.
    assert touched[1].tolist() == [True, True, True, True]
    assert touched[0].all()
    assert not np.any(gradients["head"]["kernel"])


def test_compact_teacher_is_close(params: Any, exact: tuple[Batch, Any, Any]) -> None:
    batch, after, expected = exact
    method = make_method(store_attention="uint8", store_logits=6)
    records = records_of(method, params, dataclasses.replace(batch, origin="task", teacher=None))
    assert records[0]["rows"].dtype == np.uint8
    assert records[0]["top_ids"].shape == (3, 6)
    teacher = teacher_of(method, params, records)
    found = terms_of(method, after, remembered(batch, teacher))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["attention"] == pytest.approx(expected["attention"], rel=0.02)
    assert 0.5 * expected["logits"][0] < found["logits"][0] < expected["logits"][0] * 1.0001


def test_with_drawn_tokens_the_compact_teacher_is_right_on_average(params: Any, exact: tuple[Batch, Any, Any]) -> None:
    batch, after, expected = exact
    method = make_method(store_logits=8, store_drawn=0.5)
    state, plain = state_of(method, params), dataclasses.replace(batch, origin="task", teacher=None)
    signals, loss = jax.jit(method.signals), jax.jit(method.loss)
    found = []
    for key in map(jax.random.key, range(30)):
        stored = signals(params, state, plain, key)
        assert stored["top_ids"].shape == stored["drawn_ids"].shape == (3, 3, 4)
        terms = loss(after, state, dataclasses.replace(batch, teacher=stored), key)
        found.append(float(terms["logits"].sum))
    assert np.std(found) > 0
    assert np.mean(found) == pytest.approx(expected["logits"][0], abs=4 * np.std(found) / 30**0.5)
    assert np.std(found) < 0.5 * expected["logits"][0]


def test_all_queries(params: Any) -> None:
    method = make_method(query_budget=0)
    records = records_of(method, params, BATCH)
    assert [record["queries"].tolist() for record in records] == [list(range(n)) for n in (6, 4, 5)]
    assert teacher_of(method, params, records)["queries"].shape == (3, 7)


def test_rows_of_the_task_have_the_plain_loss(params: Any) -> None:
    found = terms_of(make_method(), params, BATCH)
    expected = -np.take_along_axis(output_logs(params, BATCH), np.asarray(BATCH.targets)[..., None], -1)[..., 0]
    assert list(found) == ["loss"]
    np.testing.assert_allclose(found["loss"], (np.sum(expected * np.asarray(BATCH.weights)), 8, 1), rtol=1e-4)


def test_remembered_rows_without_teacher_are_refused(params: Any) -> None:
    method = make_method()
    with pytest.raises(UserError, match="packing"):
        method.loss(params, method.init(params), dataclasses.replace(BATCH, origin="memory"), jax.random.key(0))


def test_heads_are_selected_over_tasks(params: Any) -> None:
    first, second = perturbed(params, 0.1, seed=1), perturbed(params, 0.2, seed=2)
    tasks = [(params, first, [BATCH]), (first, second, [make_batch(seed=3), make_batch(seed=4)])]
    measured = []

    @jax.jit
    def measure(before: Any, after: Any, s: Any, f: Any, batch: Batch) -> Any:
        s = add_sensitivity(NETWORK, s, after, batch, 0)
        return s, add_forgettability(NETWORK, f, before, after, batch)

    for before, after, batches in tasks:
        s = f = HeadSums.zero(NETWORK.num_layers, NETWORK.num_heads)
        for batch in batches:
            s, f = measure(before, after, s, f, batch)
        share = np.asarray(s.mean(), np.float64)
        measured.append((share / share.sum(axis=1, keepdims=True), np.asarray(f.mean(), np.float64)))

    method = make_method(layer_budget=1)
    state = start = method.init(params)
    for index, (before, after, batches) in enumerate(tasks):
        state = method.consolidate(after, state, StandInTask(batches, index=index, before=before))
        importance = sum(s for s, _ in measured[: index + 1]) * sum(f for _, f in measured[: index + 1])
        layer = int(importance.sum(axis=1).argmax())
        heads = sorted(np.argsort(-importance[layer])[:3].tolist())
        assert state["heads"][index].tolist() == [[layer, head] for head in heads]
        np.testing.assert_allclose(state["sensitivity"][index], measured[index][0], rtol=1e-3)
        np.testing.assert_allclose(state["forgettability"][index], measured[index][1], rtol=1e-3)
        np.testing.assert_allclose(method.tables(state)["importance_heads"], importance, rtol=1e-3)
    selected = np.asarray(method.tables(state)["selected_heads"])
    assert selected.sum(axis=(1, 2)).tolist() == [3, 3]
    assert all(selected[0, layer, head] for layer, head in state["heads"][0].tolist())
    assert not np.any(method.tables(start)["selected_heads"])
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), state, start)


def test_random_heads_are_drawn_by_the_key_and_by_nothing_else(params: Any) -> None:
    method = make_method(importance="random", head_budget=2, layer_budget=1)
    state = method.init(params)
    one = HeadSums(jnp.ones_like(state["sensitivity"][0]), jnp.float32(1))
    other = HeadSums(jnp.arange(8.0).reshape(2, 4), jnp.float32(1))
    chosen = []
    for seed in range(6):
        key = jax.random.key(seed)
        heads = method.select(state, one, one, jnp.int32(1), key)["heads"][1]
        assert heads.tolist() == method.select(state, other, other, jnp.int32(1), key)["heads"][1].tolist()
        draws = np.asarray(jax.random.uniform(key, (2, 4)))
        layer = int(draws.sum(axis=1).argmax())
        assert heads.tolist() == [[layer, head] for head in sorted(np.argsort(-draws[layer])[:2].tolist())]
        chosen.append(str(heads.tolist()))
    assert len(set(chosen)) > 2


TAUGHT = {"distil_on": "task", "query_budget": 0}


@pytest.mark.parametrize("learned", [1, 2])
def test_without_a_memory_the_model_before_the_task_teaches_on_its_rows(params: Any, learned: int) -> None:
    """A row's loss equals that of a remembered row of the last task learned, with the signals of the same model."""
    method, known = make_method(**TAUGHT), perturbed(params, 0.1, seed=1)
    batch = dataclasses.replace(BATCH, task=jnp.full_like(BATCH.task, learned - 1))
    state = method.prepare(known, state_of(method, params), StandInTask([batch], index=learned))
    student = perturbed(params, 0.3, seed=2)
    found = jax.jit(method.loss)(student, state, batch, jax.random.key(0))

    keeper = make_method(query_budget=0)
    records = stored_records(keeper, known, state, batch, 1)
    teacher = collated(keeper, known, state, records, batch.tokens.shape[1], batch.targets.shape[1])
    expected = jax.jit(keeper.loss)(student, state, remembered(batch, teacher), jax.random.key(0))
    assert found.keys() == expected.keys()
    for name, term in found.items():
        np.testing.assert_allclose((term.sum, term.count), (expected[name].sum, expected[name].count), rtol=1e-4)
    assert (found["loss"].weight, found["logits"].weight) == (1.0, 0.5)
    assert float(found["logits"].sum) > 0
    assert float(found["attention"].sum) > 0


def test_at_the_start_of_a_task_its_teacher_agrees_and_before_the_first_there_is_none(params: Any) -> None:
    method = make_method(**TAUGHT)
    assert method.replay is None
    first = method.prepare(params, method.init(params), StandInTask([BATCH], index=0))
    terms = jax.jit(method.loss)(perturbed(params, 0.3), first, BATCH, jax.random.key(0))
    assert float(terms["logits"].count) == float(terms["attention"].count) == 0
    assert float(terms["logits"].sum) == float(terms["attention"].sum) == 0

    later = method.prepare(params, state_of(method, params), StandInTask([BATCH], index=1))
    terms = jax.jit(method.loss)(params, later, BATCH, jax.random.key(0))
    assert float(terms["logits"].count) > 0
    np.testing.assert_allclose((terms["logits"].sum, terms["attention"].sum), 0, atol=1e-4)


def test_without_a_memory_heads_are_rated_on_the_tasks_examples(params: Any) -> None:
    method, after = make_method(**TAUGHT), perturbed(params, 0.1, seed=1)
    state = method.consolidate(after, method.init(params), StandInTask([BATCH], before=params, memory=[]))
    keeper = make_method()
    expected = keeper.consolidate(after, keeper.init(params), StandInTask([], before=params, memory=[BATCH]))
    np.testing.assert_array_equal(state["heads"], expected["heads"])


def test_shares_as_budgets() -> None:
    method = Seekr(SeekrOptions(layer_budget=0.5, head_budget=0.5), tiny_llama(num_layers=4), 1)
    assert (method.layers, method.heads, method.per_layer) == (2, 8, 4)
    assert make_method(heads_per_layer=2).per_layer == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_budget": 3}, "layer_budget: 3 "),
        ({"head_budget": 9}, "head_budget: 9 "),
        ({"layer_budget": 1, "head_budget": 5}, "head_budget: 5 .* 4 heads of 1 layer"),
        ({"layer_budget": 1.5}, "layer_budget: 1.5"),
        ({"heads_per_layer": 5}, "heads_per_layer: 5"),
        ({"heads_per_layer": 1, "head_budget": 3}, "head_budget: 3"),
        ({"replay": {"fraction": 0, "minimum": 0}}, "replay.fraction"),
    ],
)
def test_impossible_options_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Seekr.check(SeekrOptions(**{**EXACT, **changes}), NETWORK.config)


def test_replay_keeps_what_it_is_told() -> None:
    options = ReplayOptions(replay=ReplayConfig(fraction=0.1))
    assert ReplayMethod(options, NETWORK, 1).replay == ReplayConfig(fraction=0.1)
    with pytest.raises(ValueError, match=r"replay\.fraction"):
        ReplayMethod.check(ReplayOptions(replay=ReplayConfig(fraction=0, minimum=0)), NETWORK.config)
    assert Seekr(SeekrOptions(head_budget=1, layer_budget=1), tiny_roberta(), 1).replay == ReplayConfig()
