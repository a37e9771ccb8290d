"""Steps that are not finite change nothing, are counted, and end the training only when they do not end."""

from __future__ import annotations

import os
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional.terms import Term
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.feed import place_batch
from jaxcl.training.interrupt import StoppedTogether
from jaxcl.training.loop import train_task
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.privacy import PrivacyConfig
from jaxcl.training.trainer import Trainer
from jaxcl.training.watch import NotFinite, Watch
from tests.tiny.trainer import AXES, SHAPES, Collect, Rows, TinyMethod, assert_same, host, make_params, make_rows
from tests.tiny.trainer import make_trainer as plain_trainer


class Tracking(TinyMethod):
    """A method whose state moves with every step. A weight of 2 makes its gradient infinite, but not its loss."""

    def init(self, params: Any) -> Any:
        return {"gradient": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), "seen": jnp.zeros((3,))}

    def loss(self, params: Any, state: Any, batch: Any, key: Any) -> Any:
        nothing = jnp.sum(params["head"]["bias"] - jax.lax.stop_gradient(params["head"]["bias"]))
        steep = jnp.where(jnp.any(batch.weights == 2), 3e38, 0.0) * nothing.astype(jnp.float32)
        return {**super().loss(params, state, batch, key), "steep": Term(steep + steep, jnp.float32(1))}

    def track(self, params: Any, state: Any, before: Any, gradient: Any, means: Any) -> Any:
        return {"gradient": gradient, "seen": state["seen"] + means["lm"]}


class Poisoned(Rows):
    """Rows of which one token weighs `value` at some positions."""

    def __init__(self, at: set[int], value: float = np.nan, **options: Any) -> None:
        super().__init__(**options)
        self.at, self.value = at, value

    def __next__(self) -> Any:
        rows = super().__next__()
        if self.position in self.at:
            rows["weights"] = rows["weights"].astype(np.float32)
            rows["weights"][-1, 0] = self.value
        return rows


def trainer_of(
    dtype: str = "float32", accumulate: int = 1, privacy: PrivacyConfig | None = None, **options: Any
) -> Trainer:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), SHAPES)
    layout = Layout.create(make_mesh(MeshConfig(), jax.devices()[:1]), AXES, shapes)
    optimizer = OptimizerConfig(**{"learning_rate": 0.05, "schedule": "linear", "warmup": 2, **options})
    return Trainer(Tracking(), optimizer, layout, accumulate=accumulate, seed=0, privacy=privacy)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, np.nan),
        ({"dtype": "bfloat16", "accumulate": 4}, np.inf),
        ({"average": "ema", "name": "lion", "weight_decay": 0.1}, np.nan),
        pytest.param({"name": "adafactor", "average": "sfa", "average_every": 2}, np.inf, marks=pytest.mark.slow),
        pytest.param({"privacy": PrivacyConfig(clip=1.0, noise_multiplier=1.0)}, np.nan, marks=pytest.mark.slow),
        ({}, 2.0),
    ],
)
def test_a_step_that_is_not_finite_changes_no_bit_but_the_clock(options: dict[str, Any], value: float) -> None:
    trainer = trainer_of(**options)
    params = jax.tree.map(lambda leaf: leaf.astype(trainer.target.params["head"]["bias"].dtype), make_params())
    state = trainer.start_task(trainer.init(params), 6)
    rows = Poisoned({2}, value)
    for step in range(1, 5):
        batch = next(rows)
        before = host(state)
        state, metrics = trainer.step(state, place_batch(batch, trainer.layout.batch))
        after = host(state)
        assert float(metrics["skipped"]) == (step == 2)
        assert np.isfinite(metrics["loss"]) == (step != 2 or value == 2)
        assert (int(after.step), int(after.clock.step)) == (step, step)
        changed = [
            not np.array_equal(old, new, equal_nan=True)
            for old, new in zip(
                jax.tree.leaves(before.replace(step=0, clock=0)),
                jax.tree.leaves(after.replace(step=0, clock=0)),
                strict=True,
            )
        ]
        assert any(changed) == (step != 2)
        assert all(np.isfinite(leaf.astype(np.float32)).all() for leaf in jax.tree.leaves(after))


def train(rows: Any, total: int = 12, watch: Watch | None = None, **options: Any) -> Any:
    trainer = plain_trainer()
    state = trainer.start_task(trainer.init(make_params()), total)
    feed = trainer.feed(rows, prefetch=2)
    settings = {"total": total, "task": 0, "name": "numbers", "log_every": 4, "progress": False, **options}
    return train_task(trainer, state, feed, watch=watch, **settings)


def test_a_run_goes_on_as_if_the_batch_had_made_no_update() -> None:
    trainer = plain_trainer()
    state = trainer.start_task(trainer.init(make_params()), 12)
    rows = Rows()
    for step in range(1, 13):
        batch = place_batch(next(rows), trainer.layout.batch)
        if step in (5, 6):
            count = jnp.int32(step)
            state = state.replace(step=count, clock=state.clock._replace(step=jnp.copy(count)))
        else:
            state, _ = trainer.step(state, batch)
    sink, watch = Collect(), Watch(limit=3)
    assert_same(state, train(Poisoned({5, 6}), watch=watch, sinks=[sink]))
    assert (watch.skipped, watch.streak) == (2, 0)
    assert [(row["steps"], row["skipped"]) for row in sink.rows] == [(4, 0), (4, 2), (4, 0)]
    assert all(np.isfinite(row["loss"]) for row in sink.rows)


def test_means_are_over_the_steps_that_were_made() -> None:
    sink, every = Collect(), Collect()
    train(Poisoned({5, 6}), watch=Watch(limit=3), sinks=[sink])
    train(Poisoned({5, 6}), watch=Watch(limit=3), sinks=[every], log_every=1)
    assert all("loss" not in row and row["skipped"] == 1 for row in every.rows[4:6]), "no mean over no step"
    for name in ("loss", "learning_rate", "grad_norm"):
        expected = np.mean([row[name] for row in every.rows[6:8]])
        assert sink.rows[1][name] == pytest.approx(expected, rel=1e-6)


def test_after_so_many_in_a_row_it_stops_and_names_them() -> None:
    train(Poisoned({2, 3, 5, 6}), watch=Watch(limit=3))
    with pytest.raises(NotFinite, match=r"numbers: loss is nan at steps 5 to 7 of 12, .* up to step 4 .*learning_rate"):
        train(Poisoned({2, 3, 5, 6, 7}), watch=Watch(limit=3))
    with pytest.raises(NotFinite, match=r"loss is nan at step 5 of 12, after finite values up to step 4"):
        train(Poisoned({5}))


def test_params_that_are_broken_stop_it_at_once() -> None:
    watch = Watch(limit=3)
    assert watch.add(4, "task", {"loss": 1.0, "update_norm": np.inf, "skipped": 0.0}) == "update_norm"
    assert watch.skipped == 0
    assert watch.add(5, "task", {"grad_norm": np.nan, "loss": np.nan, "skipped": 1.0}) is None
    assert (watch.skipped, watch.streak) == (1, 1)


def test_checkpoints_wait_for_a_step_that_was_made() -> None:
    """One among skipped steps would be gone back to, with the params that they began with, in place of an earlier."""
    saved: list[tuple[int, int]] = []
    watch = Watch(limit=6)
    save = lambda state, data: saved.append((int(state.step), watch.streak))  # noqa: E731
    train(Poisoned({4, 5, 8, 12}), watch=watch, save=save, save_every=4)
    assert saved == [(6, 0), (9, 0)]
    saved.clear()
    train(Poisoned({4, 5, 8, 12}), watch=Watch(limit=6), save=save, save_every=4, save_at=5)
    assert [step for step, _ in saved] == [5, 9], "one that a later task needs does not wait"


@pytest.mark.parametrize(("poisoned", "step"), [({7, 8}, 9), (set(range(7, 13)), None)])
def test_a_signal_among_skipped_steps_waits_for_their_end(poisoned: set[int], step: int | None) -> None:
    class Interrupted(Poisoned):
        def __next__(self) -> Any:
            if self.position == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    steps: list[int] = []
    trainer = plain_trainer()
    state = trainer.start_task(trainer.init(make_params()), 30)
    feed = trainer.feed(Interrupted(poisoned), prefetch=0)
    options: dict[str, Any] = {"total": 30, "task": 0, "name": "numbers", "log_every": 4, "progress": False}
    with pytest.raises(StoppedTogether):
        train_task(
            trainer,
            state,
            feed,
            watch=Watch(limit=4),
            save=lambda state, data: steps.append(int(state.step)),
            **options,
        )
    # Without an end, the run would go back to the last checkpoint: there the next start begins, too.
    assert steps == ([] if step is None else [step])


def test_spikes_are_counted_and_change_nothing() -> None:
    losses = [1.0, 1.2, 0.8, 1.0, 9.0, 1.0]

    def watched(**options: Any) -> Watch:
        watch = Watch(limit=1, **options)
        for step, loss in enumerate(losses, 1):
            assert watch.add(step, "task", {"loss": loss, "skipped": 0.0}) is None
            assert watch.add(step, "memory", {"loss": 100.0 + loss / 100, "skipped": 0.0}) is None
        return watch

    assert set(watched(window=4, deviations=6.0).spikes) == {5}
    assert watched(window=5, deviations=6.0).spikes == [], "five losses are not known before the fifth"
    assert watched(window=4, deviations=1e6).spikes == []
    assert watched().spikes == []
    sink = Collect()
    plain = train(Rows(), sinks=[Collect()])
    assert_same(plain, train(Rows(), sinks=[sink], watch=Watch(limit=1, window=2, deviations=0.01)))
    assert sum(row["spikes"] for row in sink.rows) > 0


def test_what_was_counted_goes_on_from_its_note() -> None:
    whole, first = Watch(3, 2, 1.0), Watch(3, 2, 1.0)
    steps = [(float(loss), float(loss == 7)) for loss in (1, 2, 7, 9, 1, 7, 7, 5)]
    for step, (loss, skipped) in enumerate(steps, 1):
        assert whole.add(step, "task", {"loss": loss, "skipped": skipped}) is None
    for step, (loss, skipped) in enumerate(steps[:4], 1):
        first.add(step, "task", {"loss": loss, "skipped": skipped})
    rest = Watch(3, 2, 1.0, **first.plain())
    for step, (loss, skipped) in enumerate(steps[4:], 5):
        rest.add(step, "task", {"loss": loss, "skipped": skipped})
    assert rest.plain() == whole.plain()
    assert rest.spikes
    assert rest.skipped == 3


def test_rows_of_a_poisoned_batch_are_as_given() -> None:
    """The tests above poison one weight of the last row: the row counts, also among micro-batches."""
    rows = Poisoned({1}, np.inf)
    batch = next(rows)
    assert np.isinf(batch["weights"]).sum() == 1
    np.testing.assert_array_equal(batch["tokens"], make_rows(1, uneven=True)["tokens"])
