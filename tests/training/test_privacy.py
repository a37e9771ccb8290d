"""Clipped gradients and noise, against loops over single examples and closed forms."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.run.rewinding import spent_on
from jaxcl.training.feed import place_batch
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.privacy import PrivacyConfig, check_private, spent
from jaxcl.training.trainer import Trainer
from jaxcl.training.watch import Watch
from tests.tiny.trainer import TinyMethod, host, make_params, make_rows, make_trainer, one_device

RATE = 1e-2
DESCENT: dict[str, Any] = {
    "name": "sgd",
    "b1": 0,
    "clip_norm": None,
    "schedule": "constant",
    "warmup": 0,
    "learning_rate": RATE,
}


@functools.cache
def private_trainer(clip: float, noise: float = 0.0, accumulate: int = 1) -> Trainer:
    privacy = PrivacyConfig(clip=clip, noise_multiplier=noise)
    section = OptimizerConfig(**DESCENT)
    return Trainer(TinyMethod(), section, one_device(), accumulate=accumulate, seed=0, privacy=privacy)


def gradient(trainer: Trainer, rows: dict[str, Any], steps: int = 1) -> np.ndarray:
    """What the optimizer saw in the last step: plain descent shows it."""
    state = trainer.start_task(trainer.init(make_params()), 10)
    for _ in range(steps):
        before = host(state.params)
        state, _ = trainer.step(state, place_batch(rows, trainer.layout.batch))
    moved = jax.tree.map(lambda a, b: (a - b) / RATE, before, host(state.params))
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moved)])


def single_gradients(rows: dict[str, Any]) -> np.ndarray:
    """The plain step on one row after the other."""
    alone = make_trainer(**DESCENT)
    parts = [
        {name: value[row : row + 1] if isinstance(value, np.ndarray) else value for name, value in rows.items()}
        for row in range(len(rows["tokens"]))
    ]
    return np.stack([gradient(alone, part) for part in parts])


def test_without_noise_or_clipping_it_is_the_plain_step() -> None:
    rows = make_rows(0)  # every row counts the same: the mean over rows is the mean over positions
    np.testing.assert_allclose(gradient(private_trainer(1e9), rows), gradient(make_trainer(**DESCENT), rows), atol=2e-4)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_each_example_is_clipped_by_its_own_norm(accumulate: int) -> None:
    rows = make_rows(3, uneven=True)
    single = single_gradients(rows)
    norms = np.linalg.norm(single, axis=1)
    clip = float(np.median(norms[norms > 0]))
    assert (norms > clip).any()
    assert ((norms > 0) & (norms < clip)).any()
    factors = np.minimum(1.0, clip / np.maximum(norms, 1e-12))
    expected = np.mean(single * factors[:, None], axis=0)
    found = gradient(private_trainer(clip, accumulate=accumulate), rows)
    np.testing.assert_allclose(found, expected, atol=3e-4)
    assert np.abs(expected).max() > 0.05


def test_noise_has_the_stated_deviation_and_is_new_in_every_step() -> None:
    rows, clip, noise = make_rows(1), 1.0, 3.0
    quiet = gradient(private_trainer(clip), rows)
    loud = gradient(private_trainer(clip, noise), rows)
    drawn = loud - quiet
    # 187 draws: the sample deviation lies within 20% of the true one but for four in a hundred thousand cases.
    assert np.std(drawn) == pytest.approx(noise * clip / 8, rel=0.2)
    assert abs(np.mean(drawn)) < 4 * noise * clip / 8 / np.sqrt(drawn.size)
    again = gradient(private_trainer(clip, noise), rows)
    np.testing.assert_array_equal(loud, again)  # the same key, the same noise
    second = gradient(private_trainer(clip, noise), rows, steps=2)
    assert np.abs(np.corrcoef(second, loud)[0, 1]) < 0.5


def test_epsilon_is_that_of_the_gaussian_mechanism() -> None:
    r"""By hand: $T$ Gaussian mechanisms have Renyi divergence $\alpha T / 2 \sigma^2$ at order $\alpha$, which gives
    $\epsilon = \min_\alpha \alpha T / 2 \sigma^2 + \log(1 - 1/\alpha) - \log(\alpha \delta) / (\alpha - 1)$
    (Canonne, Kamath & Steinke, 2020, proposition 12)."""
    config = PrivacyConfig(clip=0.5, noise_multiplier=4.0, delta=1e-6)
    orders = np.linspace(1.01, 500, 200_000)
    for epochs in (1, 3):
        divergence = orders * epochs / (2 * 4.0**2)
        by_hand = np.min(divergence + np.log1p(-1 / orders) - np.log(orders * 1e-6) / (orders - 1))
        found = spent(config, steps=epochs * 50, steps_per_epoch=50)
        assert found["epsilon"] == pytest.approx(by_hand, rel=0.01)
        assert 0 < found["epsilon_poisson"] < found["epsilon"]
    assert spent(PrivacyConfig(clip=1, noise_multiplier=0), steps=1, steps_per_epoch=1)["epsilon"] == np.inf


def test_a_part_of_an_epoch_counts_as_a_whole_one() -> None:
    config = PrivacyConfig(clip=1.0, noise_multiplier=2.0)
    assert (
        spent(config, steps=11, steps_per_epoch=10)["epsilon"] == spent(config, steps=20, steps_per_epoch=10)["epsilon"]
    )


def test_steps_that_were_left_behind_count_and_another_order_brings_an_example_twice_more() -> None:
    """The worst case: it came last in the first epoch, and with the new order again within that epoch."""
    config = PrivacyConfig(clip=1.0, noise_multiplier=2.0)

    class Stream:
        own_steps_per_epoch = 10

        def own_steps_in(self, steps: int) -> int:
            return steps - steps // 3  # every third step is a general one

    watch = Watch(left=[[6, 12]])
    found = spent_on(config, Stream(), 30, watch)  # type: ignore[arg-type]
    assert found == spent(config, steps=20 + 4, steps_per_epoch=10, rewinds=1)
    assert found["epsilon"] == spent(config, steps=50, steps_per_epoch=10)["epsilon"]
    assert spent_on(config, Stream(), 30, Watch()) == spent(config, steps=20, steps_per_epoch=10)  # type: ignore[arg-type]


def test_what_cannot_be_private_is_refused() -> None:
    def method(**changes: Any) -> Any:
        return SimpleNamespace(**{"couples_examples": False, "replay": None, "joint": False, **changes})

    check_private(method(), "sequential")
    check_private(method(replay=SimpleNamespace(source="synthetic")), "replay")
    with pytest.raises(UserError, match="the loss of das compares the examples of a batch with each other"):
        check_private(method(couples_examples=True), "das")
    with pytest.raises(UserError, match="source=synthetic"):
        check_private(method(replay=SimpleNamespace(source="kept")), "replay")
