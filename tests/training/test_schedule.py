"""Learning rates over a task, by hand from the papers' formulas and by optax's schedules."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import ValidationError

from jaxcl.errors import UserError
from jaxcl.training.feed import place_batch
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.schedule import Clock, Phases, learning_rate, phases, sized_in_steps
from tests.tiny.trainer import assert_same, host, make_params, make_rows, make_trainer

INFINITE: dict[str, Any] = {
    "learning_rate": 8.0,
    "schedule": "infinite",
    "constant": 0.25,
    "final": 1 / 32,
    "warmup": 2,
    "cooldown": 4,
    "decay": 3,
}
WSD: dict[str, Any] = {"learning_rate": 4.0, "schedule": "wsd", "final": 0.25, "warmup": 2, "decay": 4}


def rates(options: dict[str, Any], total: int, *, first: bool = True) -> list[float]:
    config = OptimizerConfig(**options)
    clock = Clock.start(config, total, first=first)
    return [float(learning_rate(config, clock._replace(step=jnp.int32(step)))) for step in range(total)]


def test_wsd_warms_up_is_stable_and_decays() -> None:
    assert rates(WSD, 10) == [0, 2, 4, 4, 4, 4, 4, 3.25, 2.5, 1.75]


@pytest.mark.parametrize(
    ("shape", "expected"),
    # At a quarter, a half and three quarters: 4 - 3 * (0.5, 0.7071, 0.8660) and 4 * (0.7071, 0.5, 0.3536).
    [("sqrt", [4, 2.5, 1.878680, 1.401924]), ("exponential", [4, 2.828427, 2, 1.414214])],
)
def test_other_shapes_of_the_decay(shape: str, expected: list[float]) -> None:
    assert rates({**WSD, "decay_shape": shape}, 10)[6:] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "cooldown"),
    [
        # 2 + 3 (1 + cos(pi x)) at x = 0, 1/4, 1/2, 3/4
        ({}, [8, 7.121320, 5, 2.878680]),
        # h(x) = 1 / sqrt(1 + 8 x) - 1 is 0, -0.422650, -0.552786, -0.622036 there and -2/3 at 1; 8 - 6 h(x) / h(1)
        ({"cooldown_shape": "inverse_sqrt", "cooldown_steepness": 8.0}, [8, 4.196152, 3.024922, 2.401680]),
    ],
)
def test_infinite_is_the_papers_formula(options: dict[str, Any], cooldown: list[float]) -> None:
    constant, annealing = [2, 2, 2, 2], [2, 1, 0.5]  # 2 (1 / 8)^q at q = 0, 1/3, 2/3
    assert rates({**INFINITE, **options}, 13) == pytest.approx([0, 4, *cooldown, *constant, *annealing], rel=1e-6)


def test_later_tasks_of_infinite_are_constant_until_the_annealing() -> None:
    assert rates(INFINITE, 6, first=False) == pytest.approx([2, 2, 2, 2, 1, 0.5], rel=1e-6)
    assert rates(WSD, 10, first=False) == rates(WSD, 10), "wsd warms up in every task"


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_long_schedules_equal_those_of_optax(shape: str) -> None:
    total, warmup, cooldown, decay = 200, 20, 40, 30
    options = {**INFINITE, "warmup": 0.1, "cooldown": 0.2, "decay": 0.15}
    last = optax.exponential_decay(2.0, decay, 1 / 8)
    if shape == "linear":
        options |= {"decay_shape": "linear"}
        last = optax.linear_schedule(2.0, 0.25, decay)
    reference = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 8.0, warmup),
            optax.cosine_decay_schedule(8.0, cooldown, alpha=0.25),
            optax.constant_schedule(2.0),
            last,
        ],
        [warmup, warmup + cooldown, total - decay],
    )
    np.testing.assert_allclose(rates(options, total), [float(reference(step)) for step in range(total)], rtol=2e-6)


@pytest.mark.parametrize("options", [WSD, INFINITE, {"schedule": "cosine", "warmup": 3}, {"schedule": "constant"}])
def test_the_schedule_begins_after_the_moments(options: dict[str, Any]) -> None:
    assert rates({**options, "warm_moments": 3}, 23) == [0, 0, 0, *rates(options, 20)]


def test_sizes_of_phases() -> None:
    wsd = OptimizerConfig(schedule="wsd", warmup=0.07, decay=0.1)
    assert phases(wsd, 100) == Phases(7, 0, 10)  # 0.07 * 100 is above 7 in floating point
    assert phases(wsd, 11) == Phases(1, 0, 2)
    infinite = OptimizerConfig(**{**INFINITE, "warm_moments": 4, "cooldown": 0.25})
    assert phases(infinite, 24) == Phases(2, 5, 3)
    assert phases(infinite, 24, first=False) == Phases(0, 0, 3)


def test_shares_fit_into_every_task_and_leave_a_step_before_the_decay() -> None:
    for warmup, decay, moments in itertools.product((0.0, 0.3, 0.5), (0.01, 0.5), (0, 1)):
        config = OptimizerConfig(schedule="wsd", warmup=warmup, decay=decay, warm_moments=moments)
        for total in range(1 + moments, 9):
            sizes = phases(config, total)
            assert sum(sizes) <= total - moments
            assert Clock.start(config, total).decay_start == total - sizes.decay >= 1


@pytest.mark.parametrize(
    ("options", "total", "message"),
    [
        ({"warm_moments": 5}, 5, "warm_moments 5 leaves none of 5 steps"),
        ({"schedule": "constant", "warmup": 6}, 5, "warmup 6 steps do not fit into 5 steps"),
        ({"warmup": 6, "warm_moments": 2}, 7, "warmup 6 steps do not fit into 5 steps after warm_moments 2"),
        ({"schedule": "wsd", "warmup": 6, "decay": 5}, 10, "warmup 6 and decay 5 steps do not fit into 10 steps"),
        ({"schedule": "wsd", "decay": 10}, 10, "decay 10 steps do not fit into 10 steps"),
        (
            {**INFINITE, "warm_moments": 2},
            10,
            "warmup 2 and cooldown 4 and decay 3 steps do not fit into 8 steps after warm_moments 2",
        ),
    ],
)
def test_sizes_in_steps_that_do_not_fit_are_refused(options: dict[str, Any], total: int, message: str) -> None:
    config = OptimizerConfig(**options)
    assert sized_in_steps(config)
    with pytest.raises(UserError, match=f"^optimizer: {message}$"):
        phases(config, total)
    phases(config, 100)


@pytest.mark.parametrize("options", [{"warmup": 0.9}, {"schedule": "wsd"}, {"schedule": "infinite", "final": 0.1}])
def test_other_sizes_fit_into_every_task(options: dict[str, Any]) -> None:
    config = OptimizerConfig(**options)
    assert not sized_in_steps(config)
    phases(config, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 0.2}, "decay is only for schedule wsd or infinite; the schedule is linear"),
        ({"schedule": "wsd", "constant": 0.2}, "constant is only for schedule infinite; the schedule is wsd"),
        ({"schedule": "infinite"}, "final must be above 0"),
        ({"schedule": "wsd", "decay_shape": "exponential"}, "final must be above 0"),
        ({"schedule": "infinite", "final": 0.6}, r"final must be at most constant \(0.5\), got 0.6"),
        ({"schedule": "wsd", "warmup": 0.5, "decay": 0.6}, "at most 1, got warmup 0.5, decay 0.6"),
        ({"schedule": "wsd", "decay": 0}, "decay"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimizerConfig(**options)


def test_moments_are_kept_where_tasks_go_on_before_the_decay() -> None:
    kept = {"wsd": False, "infinite": False, "linear": True, "cosine": True, "constant": True}
    for schedule, reset in kept.items():
        assert OptimizerConfig(schedule=schedule, final=0.0 if schedule == "constant" else 0.1).reset_optimizer is reset
    assert OptimizerConfig(schedule="wsd", reset_optimizer=True).reset_optimizer


def test_moments_are_estimated_while_params_keep_every_bit() -> None:
    """The moments are those of steps at learning rate 0; -0.0 stays -0.0."""
    params = jax.tree.map(lambda leaf: leaf.at[0].set(-0.0), make_params())
    warm = make_trainer(warm_moments=3, weight_decay=0.1, schedule="constant", warmup=0)
    still = make_trainer(learning_rate=0.0, weight_decay=0.1, schedule="constant", warmup=0)
    states = [trainer.start_task(trainer.init(jax.tree.map(jnp.copy, params)), 6) for trainer in (warm, still)]
    for index in range(3):
        batch = place_batch(make_rows(index), warm.layout.batch)
        states = [trainer.step(state, batch)[0] for trainer, state in zip((warm, still), states, strict=True)]
    assert_same(jax.tree.map(_bits, host(params)), jax.tree.map(_bits, host(states[0].params)))
    assert_same(states[0].opt_state, states[1].opt_state)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(host(states[0].opt_state)))
    after, metrics = warm.step(states[0], place_batch(make_rows(3), warm.layout.batch))
    assert float(metrics["learning_rate"]) == pytest.approx(0.05)
    assert not np.array_equal(host(after.params)["head"]["kernel"], params["head"]["kernel"])


def _bits(leaf: np.ndarray) -> np.ndarray:
    return leaf.view(np.uint32)
