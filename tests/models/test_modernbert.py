"""ModernBERT's own: a first layer without a norm, windows on both sides, a head that both scores begin with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.network import Network
from jaxcl.weights.tree import flatten, unflatten
from tests.tiny.batches import batch_of
from tests.tiny.networks import modernbert, params_of

SEGMENTS = [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]


def changed(params: Any, path: str, place: Any = ...) -> Any:
    flat = flatten(params)
    return unflatten(flat | {path: flat[path].at[place].add(0.5)})


def logits(network: Network, params: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda: network.logits(params, network.hidden(params, batch_of(SEGMENTS)).states))())


def test_the_first_layer_has_no_norm() -> None:
    network = modernbert(num_layers=3)
    params = params_of(network)
    base = logits(network, params)
    for part in ("scale", "bias"):
        path = f"blocks/attention_norm/{part}"
        np.testing.assert_array_equal(logits(network, changed(params, path, 0)), base)
        for layer in (1, 2):
            assert np.abs(logits(network, changed(params, path, layer)) - base).max() > 1e-3
    slope = jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(network.hidden(params, batch_of(SEGMENTS)).states))))(
        params
    )
    largest = np.abs(slope["blocks"]["attention_norm"]["scale"]).max(1)
    assert largest[0] == 0
    assert np.all(largest[1:] > 0)


@pytest.mark.parametrize(("types", "seen"), [(("window",), 2), (("full",), 11)])
def test_a_window_is_on_both_sides(types: tuple[str, ...], seen: int) -> None:
    """A layer with a window of 3 sees two tokens before and two behind."""
    network = modernbert(num_layers=1, layer_types=types, window=3 if types == ("window",) else 0, num_labels=0)
    params, tokens = params_of(network), np.arange(12)[None] % 13
    other = tokens.copy()
    other[0, 5] = 12
    one, two = (network.hidden(params, batch_of([[1] * 12], row)).states for row in (tokens, other))
    differs = np.abs(one - two).max((0, 2)) > 1e-5
    assert differs.tolist() == [abs(place - 5) <= seen for place in range(12)]


def test_layers_with_a_window_have_a_rotary_base_of_their_own() -> None:
    params = params_of(modernbert())
    base = logits(modernbert(), params)
    for changes in ({"rope_theta": 20.0}, {"window_rope_theta": 20.0}, {"window_rope_theta": None}):
        assert np.abs(logits(modernbert(**changes), params) - base).max() > 1e-4, changes
    same = modernbert(rope_theta=7.0, window_rope_theta=7.0)
    assert same.config.window_rope_theta is None
    np.testing.assert_array_equal(
        logits(same, params), logits(modernbert(rope_theta=7.0, window_rope_theta=None), params)
    )


def test_both_scores_begin_with_the_same_head() -> None:
    network = modernbert()
    params, batch = params_of(network), batch_of(SEGMENTS)
    states = network.hidden(params, batch).states
    for path in ("head/dense/kernel", "head/dense/bias", "head/norm/scale", "head/norm/bias"):
        moved = changed(params, path, 0)
        assert np.abs(network.logits(moved, states) - network.logits(params, states)).max() > 1e-3, path
        assert np.abs(network.classify(moved, states, batch) - network.classify(params, states, batch)).max() > 1e-3
    moved = changed(params, "head/bias", 4)
    np.testing.assert_allclose(
        network.logits(moved, states) - network.logits(params, states),
        np.broadcast_to(0.5 * (np.arange(13) == 4), (*states.shape[:2], 13)),
        atol=1e-5,
    )
    assert "bias" not in modernbert(vocab_bias=False).shapes()["head"]


def test_the_mean_is_over_real_tokens() -> None:
    network = modernbert(pooling="mean")
    params, batch = params_of(network), batch_of([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    states = network.hidden(params, batch).states
    scores = network.classify(params, states, batch)
    np.testing.assert_array_equal(network.classify(params, states.at[0, 3:].set(9.0), batch), scores)
    mean = jnp.stack([states[0, :3].mean(0), states[1].mean(0)])[:, None]
    first = modernbert(pooling="cls")
    np.testing.assert_allclose(first.classify(params, mean, batch), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10}, r"hidden_size \(10\) must be a multiple of num_heads \(3\)"),
        ({"window": 0}, "window: expected at least 1 where layer_types has window, got 0"),
        ({"pooling": "max"}, "'cls' or 'mean'"),
        ({"lora": {"targets": ("q_proj",)}}, "'query', 'key'"),
    ],
)
def test_fields_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modernbert(**changes)
