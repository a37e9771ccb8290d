"""Averages of params: by hand with plain gradient descent, and through the trainer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.functional.averaging import averaged, finish_average, restart_average
from jaxcl.training.feed import place_batch
from jaxcl.training.optimizer import OptimizerConfig
from tests.tiny.trainer import host, make_params, make_rows, make_trainer

GRADIENTS = [1.0, -3.0, 2.0, 0.5]


def by_hand(how: str, start: float, rate: float, every: int) -> float:
    now = mean = start
    for step, gradient in enumerate(GRADIENTS, 1):
        now -= 0.1 * gradient
        mean = (1 - rate) * mean + rate * now
        if how == "sfa" and step % every == 0:
            now = rate * start + (1 - rate) * now
    return {"ema": mean, "wise": start + rate * (now - start), "sfa": now}[how]


@pytest.mark.parametrize("how", ["ema", "wise", "sfa"])
def test_a_task_ends_with_the_average_of_the_formula(how: Any) -> None:
    optimizer = averaged(optax.sgd(0.1), how, 0.3, 2)
    params = {"w": jnp.float32(2.0)}
    state = optimizer.init(params)
    for start in (2.0, None):  # the second task starts where the first one ended
        start = float(params["w"]) if start is None else start
        state = restart_average(state, params)
        for gradient in GRADIENTS:
            updates, state = jax.jit(optimizer.update)({"w": jnp.float32(gradient)}, state, params)
            params = optax.apply_updates(params, updates)
        params = finish_average(state, params, how, 0.3)
        np.testing.assert_allclose(params["w"], by_hand(how, start, 0.3, 2), rtol=1e-6)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("how", ["ema", "wise", "sfa"])
def test_tasks_of_a_run_end_with_averages(how: str, reset: bool) -> None:
    """Against a trainer without averages, whose params are averaged by hand between its steps."""
    options = {"schedule": "constant", "warmup": 0, "learning_rate": 0.05, "reset_optimizer": reset}
    every = {"average_every": 2} if how == "sfa" else {}
    trainer = make_trainer(average=how, average_rate=0.25, **every, **options)
    plain = make_trainer(**options)
    state, other = trainer.init(make_params()), plain.init(make_params())
    for task in range(2):
        state, other = trainer.start_task(state, 4), plain.start_task(other, 4)
        start = mean = host(other.params)
        for step in range(3):
            batch = place_batch(make_rows(10 * task + step), trainer.layout.batch)
            state, _ = trainer.step(state, batch)
            other, _ = plain.step(other, batch)
            now = host(other.params)
            mean = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, mean, now)
            if how == "sfa" and step == 1:
                pulled = jax.tree.map(lambda first, new: 0.25 * first + 0.75 * new, start, now)
                other = plain.with_params(other, jax.tree.map(jnp.asarray, pulled))
        state, now = trainer.finish_task(state), host(other.params)
        between = jax.tree.map(lambda first, new: first + 0.25 * (new - first), start, now)
        end = {"ema": mean, "wise": between, "sfa": now}[how]
        other = plain.with_params(other, jax.tree.map(jnp.asarray, end))
        jax.tree.map(
            lambda one, wanted: np.testing.assert_allclose(one, wanted, rtol=1e-5, atol=1e-7), host(state.params), end
        )
        moved = jax.tree.map(lambda one, first: float(np.abs(one - first).max()), end, start)
        assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"average_rate": 0.5}, "average_rate is only for average ema, wise or sfa; average is none"),
        ({"average": "ema", "warm_moments": 3}, "average ema and warm_moments exclude each other"),
        ({"average": "wise", "schedule": "wsd"}, "average wise needs a schedule whose tasks go on from the end"),
    ],
)
def test_what_does_not_go_together_is_an_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**options)
