"""Rotary positions: each rule against its formula in NumPy. Against transformers: `tests/parity/weights`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.rotary import RopeScaling, frequencies, rotary, rotate

WIDTH, THETA = 8, 100.0
PLAIN = THETA ** (-np.arange(0, WIDTH, 2) / WIDTH)


def test_dynamic_follows_the_length_of_each_row() -> None:
    scaling = RopeScaling(type="dynamic", factor=3.0, original_max_length=4)
    positions = jnp.array([[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5]])
    tables = rotary(positions, WIDTH, THETA, scaling)
    np.testing.assert_allclose(tables.cos[0], np.cos(np.array(positions[0])[:, None] * PLAIN), rtol=1e-5)
    base = THETA * (3.0 * 6 / 4 - 2.0) ** (WIDTH / (WIDTH - 2))  # a row of 6 tokens
    stretched = base ** (-np.arange(0, WIDTH, 2) / WIDTH)
    np.testing.assert_allclose(tables.sin[1], np.sin(np.arange(6)[:, None] * stretched), rtol=1e-4, atol=1e-6)


def test_longrope_has_divisors_for_short_and_for_long_rows() -> None:
    scaling = RopeScaling(
        type="longrope",
        original_max_length=4,
        short_factors=(1.0, 1.5, 2.0, 3.0),
        long_factors=(2.0, 3.0, 4.0, 5.0),
        attention_factor=1.25,
    )
    positions = jnp.array([[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5]])
    tables = rotary(positions, WIDTH, THETA, scaling)
    for row, divisors in ((0, scaling.short_factors), (1, scaling.long_factors)):
        angles = np.array(positions[row])[:, None] * PLAIN / divisors
        np.testing.assert_allclose(tables.cos[row], 1.25 * np.cos(angles), rtol=1e-5, atol=1e-6)


def test_yarn_keeps_fast_pairs_and_lowers_slow_ones() -> None:
    scaling = RopeScaling(type="yarn", factor=4.0, original_max_length=200, beta_fast=12.0, beta_slow=3.0)
    found = frequencies(16, THETA, scaling)
    plain = THETA ** (-np.arange(0, 16, 2) / 16)

    def pair(turns: float) -> float:
        """At which the frequency turns so often in the original window: THETA^(-2i / 16) * 200 = 2 pi turns."""
        return 8 * math.log(200 / (2 * math.pi * turns)) / math.log(THETA)

    low, high = math.floor(pair(12.0)), math.ceil(pair(3.0))
    assert 0 < low < high < 7  # all three kinds of pairs are here
    lowered = np.clip((np.arange(8) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(found, plain * (1 - lowered) + plain / 4 * lowered, rtol=1e-5)
    np.testing.assert_allclose(found[: low + 1], plain[: low + 1], rtol=1e-6)
    np.testing.assert_allclose(found[high:], plain[high:] / 4, rtol=1e-6)
    exact = frequencies(16, THETA, scaling.model_copy(update={"truncate": False}))
    lowered = np.clip((np.arange(8) - pair(12.0)) / (pair(3.0) - pair(12.0)), 0, 1)
    np.testing.assert_allclose(exact, plain * (1 - lowered) + plain / 4 * lowered, rtol=1e-5)


def test_a_share_of_the_head_is_rotated_and_the_rest_stays() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 12))
    tables = rotary(jnp.arange(3)[None], WIDTH, THETA)
    turned = rotate(x, tables)
    np.testing.assert_array_equal(turned[..., WIDTH:], x[..., WIDTH:])
    np.testing.assert_array_equal(turned[..., :WIDTH], rotate(x[..., :WIDTH], tables))
    assert np.abs(turned[:, 1:, :, :WIDTH] - x[:, 1:, :, :WIDTH]).min() > 1e-4


def test_longrope_needs_its_factors() -> None:
    with pytest.raises(ValueError, match="longrope needs short_factors and long_factors"):
        RopeScaling(type="longrope", short_factors=(1.0,))
