from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.models.batch import Batch
from jaxcl.training.compile import Compiler, enable_compilation_cache
from jaxcl.training.task import RunningTask, signal_records
from jaxcl.training.trainer import Trainer
from tests.tiny.trainer import TinyMethod, assert_same, make_params, make_rows, make_trainer


class Once:
    """Batches of 4 over `count` examples, the last one filled up."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked: list[Any] = []

    def once(self, limit: int | None, seed: int) -> Iterator[dict[str, Any]]:
        self.asked.append((limit, seed))
        total = self.count if limit is None else limit
        for start in range(0, total, 4):
            rows = make_rows(start, batch=4)
            rows["example"] = np.array([10 + index if index < total else -1 for index in range(start, start + 4)])
            yield rows


class Signalling(TinyMethod):
    def signals(self, params: Any, state: Any, batch: Batch, key: Any) -> Any:
        summed = jnp.sum(params["embed"]["embedding"][batch.tokens], axis=1)
        return {"summed": summed, "noise": jax.vmap(jax.random.uniform)(batch.keys(key))}


def make_task(trainer: Trainer, **changes: Any) -> RunningTask:
    settings: dict[str, Any] = {
        "index": 1,
        "name": "second",
        "count": 3,
        "key": jax.random.key(5),
        "seed": 9,
        "pipeline": Once(6),
        "memory": Once(6),
        "params_before": make_params,
        "compiler": trainer.compile,
    }
    return RunningTask(**{**settings, **changes})


def test_examples_and_memory_are_batches_on_the_devices() -> None:
    trainer, pipeline = make_trainer(), Once(6)
    task = make_task(trainer, pipeline=pipeline)
    assert [batch.size for batch in task.examples(limit=3)] == [4]
    assert pipeline.asked == [(3, 9)]
    batches = list(task.memory())
    assert [batch.tokens.sharding for batch in batches] == [trainer.layout.batch] * 2
    assert_same(batches[1].tokens, make_rows(4, batch=4)["tokens"])
    assert list(make_task(trainer, memory=None).memory()) == []
    assert_same(task.params_before(), make_params())


def test_signals_are_collected_row_by_row_without_fillers() -> None:
    trainer = make_trainer(Signalling())
    state = trainer.init(make_params())
    task = make_task(trainer)
    found = list(signal_records(trainer, state, task))
    examples = [example for example, _ in found]
    records = {name: [record[name] for _, record in found] for name in ("summed", "noise")}
    assert examples == [10, 11, 12, 13, 14, 15]
    embedding = np.asarray(make_params()["embed"]["embedding"])
    tokens = np.concatenate([make_rows(0, batch=4)["tokens"], make_rows(4, batch=4)["tokens"][:2]])
    expected = np.array([sum(embedding[token] for token in row) for row in tokens])
    np.testing.assert_allclose(np.array(records["summed"]), expected, rtol=1e-5, atol=1e-5)
    # What is drawn for an example follows from the task's key and the example, not from its batch.
    own = [jax.random.uniform(jax.random.fold_in(jax.random.fold_in(task.key, 0), example)) for example in examples]
    assert records["noise"] == own
    assert len(set(map(float, own))) == 6


def test_a_method_without_signals_stores_nothing() -> None:
    trainer = make_trainer()
    state = trainer.init(make_params())
    assert list(signal_records(trainer, state, make_task(trainer))) == []


def double(tree: Any) -> Any:
    double_traces.append(1)
    return jax.tree.map(lambda leaf: 2 * leaf, tree)


double_traces: list[int] = []


def test_a_function_is_compiled_once_for_all_tasks() -> None:
    trainer = make_trainer()
    compiled = Compiler(trainer.layout)
    for _ in range(3):
        result = compiled(double)(make_params())
    assert len(double_traces) == 1
    assert_same(result["head"]["bias"], 2 * make_params()["head"]["bias"])
    local = compiled(lambda tree: double(tree))
    assert local is not compiled(lambda tree: double(tree)), "closures may hold arrays and are not remembered"
    method = Signalling()
    assert compiled(method.signals) is compiled(method.signals)


def test_a_loop_over_batches_compiles_once() -> None:
    """The first sums come from nowhere, the later ones from the function itself."""
    trainer = make_trainer()
    traces = []

    def add(sums: Any, params: Any, key: Any) -> Any:
        traces.append(1)
        return {name: value + params["head"]["bias"].sum() for name, value in sums.items()}

    compiled, state = trainer.compile(add), trainer.init(make_params())
    sums: Any = {"a": jnp.zeros(3), "b": np.zeros(2, np.float32)}
    for index in range(3):
        sums = compiled(sums, state.params, jax.random.key(index))
        assert sums["a"].sharding == trainer.layout.replicated
    assert len(traces) == 1
    assert compiled.__wrapped__._cache_size() == 1  # type: ignore[attr-defined]
    np.testing.assert_allclose(sums["b"], np.full(2, 3 * np.asarray(make_params()["head"]["bias"]).sum()), rtol=1e-6)


def test_the_compilation_cache_is_set_up(tmp_path: Any) -> None:
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        enable_compilation_cache(None)
        assert {name: getattr(jax.config, name) for name in names} == before
        enable_compilation_cache(tmp_path / "cache")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")
        assert (tmp_path / "cache").is_dir()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
