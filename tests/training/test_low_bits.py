"""Params held in bfloat16 learn as float32 params do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import Method
from jaxcl.models.batch import Batch
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.feed import place_batch
from jaxcl.training.low_bits import no_low_bits, split, widen
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.state import TrainState
from jaxcl.training.trainer import Trainer
from tests.tiny.trainer import AXES, SHAPES, TinyMethod, assert_same, host, make_params, make_rows

TINY = {"learning_rate": 1e-5, "schedule": "constant"}


class Pull(TinyMethod):
    """A loss whose gradient is the same in both precisions: a multiple of every param, by row weights that are 1.

    Its state adds up what `track` sees.
    """

    def init(self, params: Any) -> Any:
        return {"way": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)}

    def loss(self, params: Any, state: Any, batch: Batch, key: Any) -> Terms:
        pulls = jax.tree.map(lambda leaf: jnp.sum(leaf.astype(jnp.float32)) * 0.5, params)
        rows = jnp.float32(batch.size)
        return {"pull": Term(sum(jax.tree.leaves(pulls), jnp.float32(0)) * rows, rows)}

    def track(self, params: Any, state: Any, before: Any, gradient: Any, means: Any) -> Any:
        return {"way": jax.tree.map(lambda way, new, old: way + (new - old), state["way"], params, before)}


def trainer_of(dtype: str, method: Method | None = None, *, accumulate: int = 1, **optimizer: Any) -> Trainer:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), SHAPES)
    layout = Layout.create(make_mesh(MeshConfig(), jax.devices()[:1]), AXES, shapes)
    section = OptimizerConfig(**{**TINY, **optimizer})
    return Trainer(method or TinyMethod(), section, layout, accumulate=accumulate, seed=0)


def start(trainer: Trainer, total: int = 1000) -> TrainState:
    """Both precisions start from the same numbers."""
    dtype = jax.tree.leaves(trainer.layout.shapes)[0].dtype
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(dtype), make_params())
    return trainer.start_task(trainer.init(params), total)


def steps(trainer: Trainer, state: TrainState, count: int, first: int = 0) -> tuple[TrainState, list[float]]:
    norms = []
    for number in range(first, first + count):
        state, metrics = trainer.step(state, place_batch(make_rows(number), trainer.layout.batch))
        norms.append(float(metrics["update_norm"]))
    return state, norms


def whole(state: TrainState) -> Any:
    return host(widen(state.params, state.low_bits))


def test_two_halves_are_the_number_and_the_high_one_is_nearest() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32)
    ties = (np.arange(0x3F80, 0x3FC0, dtype=np.uint32) << 16) + 0x8000
    numbers = np.concatenate([bits.view(np.float32), ties.view(np.float32), np.float32([0, -0.0, np.inf, -np.inf])])
    numbers = numbers[~np.isnan(numbers)]
    high, low = split({"x": jnp.asarray(numbers)}, {"x": jnp.zeros(numbers.shape, jnp.int16)})
    assert (high["x"].dtype, low["x"].dtype) == (jnp.bfloat16, jnp.int16)
    np.testing.assert_array_equal(np.asarray(widen(high, low)["x"]).view(np.uint32), numbers.view(np.uint32))
    usual = np.abs(numbers) < 1e38
    assert usual.sum() > 10000
    nearest, found = (np.asarray(x, np.float64)[usual] for x in (numbers.astype(jnp.bfloat16), high["x"]))
    exact = numbers[usual].astype(np.float64)
    np.testing.assert_array_equal(np.abs(found - exact), np.abs(nearest - exact))


def test_nan_stays_nan() -> None:
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000], np.uint32).view(np.float32)
    high, low = split({"x": jnp.asarray(nans)}, {"x": jnp.zeros(4, jnp.int16)})
    assert np.isnan(np.asarray(high["x"], np.float32)).all()
    assert np.isnan(np.asarray(widen(high, low)["x"])).all()


def test_only_bfloat16_params_have_low_bits() -> None:
    tree = {"a": {"kernel": jnp.ones(2, jnp.bfloat16), "scale": jnp.ones(3)}, "b": {"lora_a": jnp.ones(4)}}
    low = no_low_bits(tree)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), low) == {"a": {"kernel": ((2,), "int16")}}
    wide = widen(tree, low)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float32"}
    narrow, _ = split(wide, low)
    assert jax.tree.map(lambda leaf: leaf.dtype, narrow) == jax.tree.map(lambda leaf: leaf.dtype, tree)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_as_many_weights_move_as_in_float32(accumulate: int) -> None:
    moved, way, said = {}, {}, {}
    for dtype in ("float32", "bfloat16"):
        trainer = trainer_of(dtype, accumulate=accumulate)
        state = start(trainer)
        before = whole(state)
        state, norms = steps(trainer, state, 20)
        away = np.concatenate(
            [(b - a).ravel() for a, b in zip(*map(jax.tree.leaves, (before, whole(state))), strict=True)]
        )
        moved[dtype], way[dtype], said[dtype] = (away != 0).mean(), np.linalg.norm(away), sum(norms)
    assert moved["float32"] > 0.5
    assert moved["bfloat16"] == pytest.approx(moved["float32"], abs=0.03)
    assert way["bfloat16"] == pytest.approx(way["float32"], rel=0.05)
    assert said["bfloat16"] == pytest.approx(said["float32"], rel=0.05)
    assert way["bfloat16"] <= said["bfloat16"]


@pytest.mark.parametrize("optimizer", [{"weight_decay": 0.1}, {"name": "sgd"}, {"name": "lion"}], ids=str)
def test_many_tiny_steps_end_where_float32_ends(optimizer: dict[str, Any]) -> None:
    ends = {}
    for dtype in ("float32", "bfloat16"):
        trainer = trainer_of(dtype, Pull(), **optimizer)
        state, _ = steps(trainer, start(trainer), 300)
        ends[dtype] = whole(state)
        moved = host(state.method_state["way"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=3e-7, atol=1e-7), ends["float32"], ends["bfloat16"])
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ends["float32"])
    exact = jax.tree.map(lambda a, b: np.mean(np.asarray(a == b)), rounded, host(state.params))
    assert min(jax.tree.leaves(exact)) > 0.98  # but for ties and differences of the last float32 bit
    start_ = whole(start(trainer))
    # What `Method.track` sees are the steps themselves, which bfloat16 would round to nothing or to too much.
    jax.tree.map(lambda w, a, b: np.testing.assert_allclose(w, b - a, atol=3e-5), moved, start_, ends["bfloat16"])


def test_low_bits_are_saved_and_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    trainer = trainer_of("bfloat16")
    state, _ = steps(trainer, start(trainer), 5)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(host(state.low_bits)))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state, progress={})
        saved = checkpoints.latest()
        assert saved is not None
        again, _ = checkpoints.restore(trainer.target, saved)
    assert_same(again.low_bits, state.low_bits)
    one, _ = steps(trainer, state, 5, first=5)
    other, _ = steps(trainer, again, 5, first=5)
    assert_same((one.params, one.low_bits, one.opt_state), (other.params, other.low_bits, other.opt_state))


def test_low_bits_outlast_a_task_but_not_other_params() -> None:
    trainer = trainer_of("bfloat16")
    state, _ = steps(trainer, start(trainer), 5)
    kept = host(state.low_bits)
    state = trainer.start_task(state, 10)
    assert_same(state.low_bits, kept)
    assert_same(trainer.with_params(state, state.params).low_bits, kept)
    state = trainer.with_params(state, jax.tree.map(lambda leaf: leaf + 1, state.params))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(host(state.low_bits)))


def test_low_bits_wait_on_the_host_with_the_moments() -> None:
    ends = []
    for offload in (False, True):
        trainer = trainer_of("bfloat16", offload=offload)
        state, _ = steps(trainer, start(trainer), 5)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.low_bits)}
        assert (kinds == {"pinned_host"}) == offload
        ends.append(host((state.params, state.low_bits)))
    assert_same(*ends)


def test_float32_params_keep_no_low_bits() -> None:
    assert trainer_of("float32").target.low_bits == {}


def test_halves_keep_every_bit_while_moments_are_estimated() -> None:
    trainer = trainer_of("bfloat16", learning_rate=1e-2, warm_moments=2)
    before, _ = steps(trainer, start(trainer), 6)
    state = trainer.start_task(before, 10)
    parts = host((state.params, state.low_bits))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(parts[1]))
    state, _ = steps(trainer, state, 2, first=6)
    assert_same(parts, (state.params, state.low_bits))
